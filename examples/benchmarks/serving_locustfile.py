"""A client of the server for locust: `bench_serving.py` starts it.

SENTENCES names a file with a JSON list of texts, PER_REQUEST says how many a request has, RATE how many requests a
second each client tries to make (default: the next one when the last is answered).
"""

import json
import os
import random
from pathlib import Path

from locust import FastHttpUser, constant, constant_throughput, task

SENTENCES = json.loads(Path(os.environ["SENTENCES"]).read_text(encoding="utf-8"))
PER_REQUEST = int(os.environ.get("PER_REQUEST", "1"))
RATE = float(os.environ.get("RATE", "0"))
CHOICES = random.Random(0)


class Client(FastHttpUser):
    wait_time = constant_throughput(RATE) if RATE else constant(0)
    network_timeout = connection_timeout = 300.0

    @task
    def translate(self) -> None:
        texts = CHOICES.sample(SENTENCES, PER_REQUEST)
        body = {"q": texts if PER_REQUEST > 1 else texts[0], "source": "en", "target": "de"}
        with self.client.post("/translate", json=body, catch_response=True) as response:
            if response.status_code in (429, 503):
                # an answer, too: locust has it under its status, beside the translations
                response.request_meta["name"] = f"{response.status_code}"
                response.success()
            elif response.status_code == 200 and len(response.json()["translatedText"]) == 0:
                response.failure("empty translation")
