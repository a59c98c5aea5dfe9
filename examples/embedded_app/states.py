"""The states of a job processor, as Python classes: each decides by itself what comes next."""
from flexiflow import State


class Idle(State):
    """Nothing to do."""

    async def handle_message(self, message, component):
        if message["type"] == "start_job":
            return True, Processing(job=message["job"])
        return False, self


class Processing(State):
    """At work on a job; `job` and `attempt` are saved with the component."""

    def __init__(self, job=None, attempt=1):
        self.job, self.attempt = job, attempt

    async def handle_message(self, message, component):
        if message["type"] == "complete":
            component.data["done"] += 1
            return True, Complete()
        if message["type"] == "fail":
            return True, Failed(self.job, self.attempt)
        if message["type"] == "cancel":
            return True, Idle()
        return False, self


class Complete(State):
    """A job is done."""

    async def handle_message(self, message, component):
        return (True, Idle()) if message["type"] == "reset" else (False, self)


class Failed(State):
    """A job went wrong; it may be tried three times."""

    def __init__(self, job=None, attempt=1):
        self.job, self.attempt = job, attempt

    async def handle_message(self, message, component):
        if message["type"] == "retry" and self.attempt < 3:
            return True, Processing(self.job, self.attempt + 1)
        if message["type"] == "reset":
            return True, Idle()
        return False, self
