"""FlexiFlow within a FastAPI app, its inspector at /flexiflow/.

    uvicorn --app-dir examples fastapi_app:app
"""
from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from flexiflow import FlexiFlowEngine, create_app

engine = FlexiFlowEngine("flexiflow.db")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Deliver timers and queued messages for as long as the app lives."""
    async with engine:
        for name in ("config.json", "order.json"):  # the warehouse, and an order that sends to it
            engine.create_component(Path(__file__).with_name(name))
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/flexiflow", create_app(engine))


@app.post("/orders/{name}/pay")
async def pay(name: str, amount: float) -> dict[str, object]:
    """An endpoint of your own beside it."""
    receipt = await engine.handle_message(name, "pay", amount=amount)
    return receipt.as_dict()
