"""What locust's users ask: 100 candidates after 20 interactions, again and again. Imports nothing of the project."""

from __future__ import annotations

import random
from typing import Any

from locust import FastHttpUser, constant, events, task

HISTORY, CANDIDATES, ITEMS = 20, 100, 30  # ITEMS: of tests.builders.write_dataset


class Client(FastHttpUser):
    """Asks as soon as it was answered, or told to come later."""

    wait_time = constant(0)
    network_timeout = connection_timeout = 30.0

    @task
    def score(self) -> None:
        history = [{"item": f"{random.randrange(ITEMS):02d}", "label": random.randrange(2)} for _ in range(HISTORY)]
        candidates = [f"{random.randrange(ITEMS):02d}" for _ in range(CANDIDATES)]
        body = {"history": history, "candidates": candidates}
        with self.client.post("/v1/score", json=body, catch_response=True) as answer:
            if answer.status_code == 429 and answer.headers.get("Retry-After"):
                answer.request_meta["name"] = "429"
                answer.success()
            elif answer.status_code == 200 and len(answer.json()["probabilities"]) == CANDIDATES:
                answer.request_meta["name"] = "200"
                answer.success()
            else:
                answer.failure(f"status {answer.status_code}: {str(answer.text)[:200]}")


@events.quitting.add_listener
def succeed(environment: Any, **_: object) -> None:
    """Let whoever started locust judge."""
    environment.process_exit_code = 0
