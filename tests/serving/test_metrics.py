"""Metrics of a server of three processes: one answer whoever gives it, and totals that outlive processes."""

import asyncio
import os
import signal
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from served import Served, wait_for
from web import call, completion, leave

PATIENCE = 60.0
OPEN = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


class Scraped:
    """An answer of /metrics."""

    def __init__(self, served: Served) -> None:
        reply = served.ask("/metrics", method="GET")
        assert reply.status == 200
        self._samples = [sample for family in text_string_to_metric_families(reply.body.decode()) for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The one sample of this name with these labels, 0 where there is none."""
        found = [s.value for s in self._samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) < 2, (name, found)
        return found[0] if found else 0.0


def complete(served: Served, count: int) -> None:
    """So many requests of 4 tokens that get 10; a process that is not ready yet turns them away."""
    body = completion([[5, 6, 7, i] for i in range(count)], max_tokens=10)
    wait_for(lambda: served.ask(body=body).status == 200, PATIENCE)


def test_totals_outlive_processes(model: Path) -> None:
    with Served(model, "--api-server-count", "2") as served:
        before = wait_for(lambda: (s := Scraped(served))("octavo:engine_ready") and s("vllm:iteration_tokens_total_sum") > 16
                          and s, PATIENCE)  # the canary's steps are in

        def grown(name: str, by: float, **labels: str) -> bool:
            return Scraped(served)(name, **labels) - before(name, **labels) == by

        complete(served, 10)
        wait_for(lambda: grown("vllm:iteration_tokens_total_sum", 10 * (4 + 10)), PATIENCE)
        for name, count in (("time_to_first_token_seconds", 10), ("inter_token_latency_seconds", 90),
                            ("time_per_output_token_seconds", 90), ("e2e_request_latency_seconds", 10),
                            ("request_queue_time_seconds", 10)):
            assert grown(f"vllm:{name}_count", count) and grown(f"octavo:{name}_count", count)
        scraped = Scraped(served)
        steps = scraped("octavo:iteration_tokens_total_count") - before("octavo:iteration_tokens_total_count")
        assert 10 <= steps <= scraped("octavo:engine_steps_total") - before("octavo:engine_steps_total")
        assert grown("vllm:request_success_total", 10, finished_reason="length")
        assert scraped("vllm:request_prefill_time_seconds_sum") > 0.0 < scraped("vllm:request_decode_time_seconds_sum")
        assert scraped("http_requests_total", handler="/v1/completions", method="POST", status="2xx") >= 2
        assert scraped("octavo:process_threads", process="api_1") > 0 < scraped("process_open_fds")

        generated = scraped("vllm:generation_tokens_total")
        pids = {name: int(scraped("octavo:process_id", process=name)) for name in ("api_0", "api_1", "engine")}
        assert pids["api_0"] == served.pid and pids["engine"] == served.look()["engine_pid"]
        for name, kind in (("api_1", "api"), ("engine", "engine")):
            os.kill(pids[name], signal.SIGKILL)
            wait_for(lambda kind=kind: Scraped(served)("octavo:process_restarts_total", process=kind, cause="SIGKILL") == 1,
                     PATIENCE)
            assert Scraped(served)("vllm:generation_tokens_total") == generated
        wait_for(lambda: (s := Scraped(served))("octavo:engine_ready")
                 and s("octavo:process_id", process="api_1") not in (0, pids["api_1"]), PATIENCE)
        for _ in range(6):  # whoever takes them
            complete(served, 1)
        assert Scraped(served)("vllm:generation_tokens_total") == generated + 60
        wait_for(lambda: grown("vllm:iteration_tokens_total_sum", 16 * (4 + 10)), PATIENCE)


def test_gauges_are_zero_within_a_second_of_the_last_clients_leaving(server: Served) -> None:
    async def leave_all() -> None:
        body = completion(max_tokens=1000, stream=True)
        running = [asyncio.create_task(leave(server.port, body, tokens=True)) for _ in range(4)]
        await asyncio.gather(*running)
        reply = await call(server.port, "/metrics", method="GET")
        assert reply.status == 200

    asyncio.run(leave_all())
    wait_for(lambda: not any(Scraped(server)(name) for name in OPEN), 1.0, "all gauges at zero")
    assert Scraped(server)("octavo:open_requests") == 0
    assert Scraped(server)("vllm:request_success_total", finished_reason="abort") == 4
