"""A job processor that goes on where it stopped, with the snapshot functions of FlexiFlow 1.0.1.

    python app.py       (again and again; state.db remembers, remove it to begin anew)

Every change of state is shown, saved as a snapshot in state.db and counted; only the latest
snapshots are kept. A program that gives its engine a store needs none of this: see README.md.
"""
import asyncio
import os
import sqlite3
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(os.path.dirname(HERE))]  # states.py, and flexiflow.py

from flexiflow import ConfigLoader, FlexiFlowEngine, list_snapshots_sqlite  # noqa: E402
from flexiflow.extras import (  # noqa: E402
    ComponentSnapshot,
    load_latest_snapshot_sqlite,
    prune_snapshots_sqlite,
    restore_component,
    save_snapshot_sqlite,
)

MESSAGES = [
    {"type": "start_job", "job": "resize holiday.png"},
    {"type": "progress", "percent": 40},
    {"type": "fail"},
    {"type": "retry"},
    {"type": "complete"},
    {"type": "reset"},
]
KEEP = 5  # snapshots
A_RUN = 4  # messages that one run handles before it stops, in the middle of everything


def find_component(engine, config, db):
    """Return the component as it was saved last, or a new one."""
    snapshot = load_latest_snapshot_sqlite(db, config.name)
    if snapshot is None:
        print("Nothing saved yet: starting in", config.initial_state)
        return engine.create_component(config)
    print(f"Saved as number {snapshot.id}: going on in {snapshot.current_state}")
    return restore_component(snapshot, engine)


def save(component, db, **metadata):
    """Save the component as a new snapshot, and forget the oldest."""
    state = component.state_machine.current_state
    save_snapshot_sqlite(db, ComponentSnapshot(
        name=component.name,
        current_state=component.state,
        rules=component.rules,
        metadata=metadata,
        data=component.data,
        attributes=dict(vars(state)),
    ))
    prune_snapshots_sqlite(db, component.name, keep_last=KEEP)


async def main():
    db = sqlite3.connect(os.path.join(HERE, "state.db"))
    config = ConfigLoader.load_component_config(os.path.join(HERE, "config.json"))
    engine = FlexiFlowEngine()
    component = find_component(engine, config, db)
    handled = (component.metadata or {}).get("handled", 0)

    async def observe(event):
        print(f"  {event['from_state']} -> {event['to_state']}")

    await engine.event_bus.subscribe("state.changed", "observer", observe, priority=5)

    for _ in range(A_RUN):
        message = MESSAGES[handled % len(MESSAGES)]
        print(message["type"])
        await component.handle_message(message)
        handled += 1
        save(component, db, handled=handled)

    print(f"Stopping in {component.state}, {component.data['done']} done; saved:")
    for row in list_snapshots_sqlite(db, component.name, limit=3):
        print(f"  {row['id']}: {row['current_state']}")
    await engine.close()
    db.close()


if __name__ == "__main__":
    asyncio.run(main())
