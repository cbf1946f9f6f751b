"""The metrics: name, kind, labels, buckets and meaning of each; the table that code, docs and tests go by.

Owns names only; where the numbers come from is metrics.py's. Invariant: what stands here is what a scrape shows, under
``octavo:`` and, where ``vllm`` is set, under ``vllm:`` too, with the same labels and buckets.
"""

from dataclasses import dataclass

from octavo.engine.stats import STEP_SIZES

FIRST_TOKEN = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
               2560.0)
NEXT_TOKEN = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
REQUEST = (.3, .5, .8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
           7680.0)
TOKENS = tuple(float(digit * 10**power) for power in range(9) for digit in (1, 2, 5))
"""1-2-5; a scrape shows those up to max_model_len."""
COUNT = (1.0, 2.0, 5.0, 10.0, 20.0)
HTTP = (.1, .5, 1.0)
HTTP_FINE = (.01, .025, .05, .075, .1, .25, .5, .75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0)
LAG = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1.0, 2.5, 5.0)

MODEL, ENGINE = ("model_name",), ("model_name", "engine")
REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: without prefix; of counters without ``_total``. kind: "counter", "gauge", "histogram" or "summary".
        base: labels that every sample has; labels: those beyond them. buckets: upper bounds.
        prefixed: the name gets ``octavo:``, and with ``vllm`` in a second copy ``vllm:``, and so do the older names in aliases.
        unite: of gauges that each API process has: how they make one number, "sum" or "max"; "" where only one has it.
    """

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    base: tuple[str, ...] = ENGINE
    vllm: bool = True
    aliases: tuple[str, ...] = ()
    prefixed: bool = True
    unite: str = ""

    @property
    def size(self) -> int:
        """Numbers that a row of it has: counts per bucket and beyond, and the sum; or count and sum; or the number."""
        return {"histogram": len(self.buckets) + 2, "summary": 2}.get(self.kind, 1)

    @property
    def shown(self) -> str:
        """The name with what Prometheus wants at its end."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


def _own(name: str, kind: str, help: str, labels: tuple[str, ...] = (), unite: str = "", buckets: tuple[float, ...] = (),
         base: tuple[str, ...] = MODEL) -> Family:
    return Family(name, kind, help, labels, buckets, base, vllm=False, unite=unite)


RUNNING = Family("num_requests_running", "gauge", "Sequences that are being computed.")
WAITING = Family("num_requests_waiting", "gauge", "Sequences that wait to be computed.")
WAITING_BY = Family("num_requests_waiting_by_reason", "gauge", "What those wait for: capacity, or something of their own "
                    "(deferred: a grammar is being compiled).", ("reason",))
SWAPPED = Family("num_requests_swapped", "gauge", "Waiting sequences whose KV lies in host memory.")
KV_USAGE = Family("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use, 0 to 1.", aliases=("gpu_cache_usage_perc",))
HOST_USAGE = Family("cpu_cache_usage_perc", "gauge", "Share of the KV blocks in host memory in use, 0 to 1.")
PREEMPTIONS = Family("num_preemptions", "counter", "Times that a sequence had to give up its KV blocks.")
PROMPT = Family("prompt_tokens", "counter", "Prompt tokens of requests that have got their first token.")
GENERATED = Family("generation_tokens", "counter", "Generated tokens.")
BY_SOURCE = Family("prompt_tokens_by_source", "counter", "The same prompt tokens by where their KV came from.", ("source",))
CACHED = Family("prompt_tokens_cached", "counter", "Prompt tokens whose KV was found in the prefix cache.")
RECOMPUTED = Family("prompt_tokens_recomputed", "counter",
                    "Prompt tokens that the prefix cache held and that were computed all the same: a request computes something.")
QUERIES = Family("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache.",
                 aliases=("gpu_prefix_cache_queries",))
HITS = Family("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache.", aliases=("gpu_prefix_cache_hits",))
SUCCESS = Family("request_success", "counter", "Continuations that have ended, by how.", ("finished_reason",))
ITERATION = Family("iteration_tokens_total", "histogram", "Tokens that a step computed: of prompts, and generated.",
                   buckets=tuple(map(float, STEP_SIZES)))
TTFT = Family("time_to_first_token_seconds", "histogram", "From a request's arrival to its first token.", buckets=FIRST_TOKEN)
ITL = Family("inter_token_latency_seconds", "histogram", "From a token to the next one.", buckets=NEXT_TOKEN,
             aliases=("time_per_output_token_seconds",))
TPOT = Family("request_time_per_output_token_seconds", "histogram",
              "Mean time between the tokens of a request, of requests with two and more.", buckets=NEXT_TOKEN)
E2E = Family("e2e_request_latency_seconds", "histogram", "From a request's arrival to its end.", buckets=REQUEST)
QUEUE = Family("request_queue_time_seconds", "histogram", "From arrival to the first step.", buckets=REQUEST)
PREFILL = Family("request_prefill_time_seconds", "histogram", "From the first step to the first token.", buckets=REQUEST)
DECODE = Family("request_decode_time_seconds", "histogram", "From the first token to the last.", buckets=REQUEST)
INFERENCE = Family("request_inference_time_seconds", "histogram", "From the first step to the last token.", buckets=REQUEST)
PROMPT_SIZE = Family("request_prompt_tokens", "histogram", "Prompt tokens of a request.", buckets=TOKENS)
OUTPUT_SIZE = Family("request_generation_tokens", "histogram", "Tokens of a continuation.", buckets=TOKENS)
MAX_TOKENS = Family("request_params_max_tokens", "histogram", "max_tokens of a request.", buckets=TOKENS)
LONGEST = Family("request_max_num_generation_tokens", "histogram", "Tokens of a request's longest continuation.", buckets=TOKENS)
COMPUTED = Family("request_prefill_kv_computed_tokens", "histogram", "Prompt tokens of a request that were not cached.",
                  buckets=TOKENS)
PARAMS_N = Family("request_params_n", "histogram", "n of a request.", buckets=COUNT)
CACHE_CONFIG = Family("cache_config_info", "gauge", "Always 1; its labels are the options and sizes of the KV cache.",
                      base=("engine",))

STEPS = _own("engine_steps", "counter", "Steps of the engine.", base=ENGINE)
FAILED_STEPS = _own("engine_failed_steps", "counter", "Steps that ended with an error.", base=ENGINE)
BLOCKS = _own("kv_blocks", "gauge", "KV blocks by state: used (by a sequence), cached (kept for prefixes), free.", ("state",),
              base=ENGINE)
STEP_AGE = _own("engine_step_seconds", "gauge", "How long the present step has taken; 0 between steps.", base=ENGINE)
HEART_AGE = _own("engine_heartbeat_age_seconds", "gauge", "Since the engine process last said that it lives.", base=ENGINE)
READY = _own("engine_ready", "gauge", "1 while the engine takes requests.", base=ENGINE)
RESTARTS = _own("process_restarts", "counter", "Processes that ended and were started again, by kind (engine, "
                "api) and cause of the end: a signal's name or exit_CODE.", ("process", "cause"))
CUT_OFF = _own("engine_clients_cut_off", "counter", "Times that an API process did not read what the engine said.", base=ENGINE)
BAD_FRAMES = _own("engine_bad_messages", "counter", "Messages between the processes that could not be read: a bug.", base=ENGINE)
OPEN_STREAMS = _own("open_requests", "gauge", "Requests that are being answered.", unite="sum")
CONNECTIONS = _own("open_connections", "gauge", "Connections of clients.", unite="sum")
QUEUED = _own("queued_requests", "gauge", "Of the requests, those that have not begun.", unite="sum")
QUEUED_TOKENS = _own("queued_tokens", "gauge", "Their prompt tokens.", unite="sum")
OLDEST = _own("oldest_wait_seconds", "gauge", "How long the oldest of them has waited.", unite="max")
UNSENT = _own("unsent_messages", "gauge", "Messages that wait for the engine to take them in.", unite="sum")
GRAMMARS = _own("grammars_cached", "gauge", "Constraints of structured outputs that are known to compile.", unite="sum")
SLOW = _own("slow_readers_dropped", "counter", "Clients that did not read their stream and were cut off.")
LOOP_LAG = _own("event_loop_lag_seconds", "histogram", "By how much the event loops are late, looked at four times a second.",
                buckets=LAG)
PROCESS = _own("process_id", "gauge", "Number of each process of the server: api_0, api_1, ... and engine.", ("process",))
FDS = _own("process_open_fds", "gauge", "Open file descriptors of each process.", ("process",))
THREADS = _own("process_threads", "gauge", "Threads of each process.", ("process",))
RSS = _own("process_resident_memory_bytes", "gauge", "Resident memory of each process.", ("process",))

HTTP_REQUESTS = Family("http_requests", "counter", "HTTP requests; none: no such route.", ("handler", "method", "status"),
                       base=(), vllm=False, prefixed=False)
HTTP_SECONDS = Family("http_request_duration_seconds", "histogram", "Seconds to the end of the answer, streams included.",
                      ("handler", "method"), HTTP, (), vllm=False, prefixed=False)
HTTP_FINE_SECONDS = Family("http_request_duration_highr_seconds", "histogram", "The same with more buckets, over all routes.",
                           (), HTTP_FINE, (), vllm=False, prefixed=False)
HTTP_IN = Family("http_request_size_bytes", "summary", "Content-Length of requests.", ("handler",), (), (), vllm=False,
                 prefixed=False)
HTTP_OUT = Family("http_response_size_bytes", "summary", "Bytes of the bodies of answers, streams included.", ("handler",), (),
                  (), vllm=False, prefixed=False)
GC = tuple(
    Family(f"python_gc_{name}", "counter", f"Python's garbage collector, all API processes: {what}.", ("generation",), (), (),
           vllm=False, prefixed=False)
    for name, what in (("objects_collected", "objects collected"), ("objects_uncollectable", "objects that could not be"),
                       ("collections", "collections")))

# Rows of this kind exist from the start with these labels, so that a rate over them is 0 and not absent.
FIXED = {
    BY_SOURCE.name: tuple((source,) for source in ("local_compute", "local_cache_hit")),
    SUCCESS.name: tuple((reason,) for reason in REASONS),
    WAITING_BY.name: (("capacity",), ("deferred",)),
    BLOCKS.name: (("used",), ("cached",), ("free",)),
}

FAMILIES: tuple[Family, ...] = (
    RUNNING, WAITING, WAITING_BY, SWAPPED, KV_USAGE, HOST_USAGE, PREEMPTIONS, PROMPT, GENERATED, BY_SOURCE, CACHED, RECOMPUTED,
    QUERIES, HITS, SUCCESS, ITERATION, TTFT, ITL, TPOT, E2E, QUEUE, PREFILL, DECODE, INFERENCE, PROMPT_SIZE, OUTPUT_SIZE,
    MAX_TOKENS, LONGEST, COMPUTED, PARAMS_N, CACHE_CONFIG,
    STEPS, FAILED_STEPS, BLOCKS, STEP_AGE, HEART_AGE, READY, RESTARTS, CUT_OFF, BAD_FRAMES, OPEN_STREAMS, CONNECTIONS, QUEUED,
    QUEUED_TOKENS, OLDEST, UNSENT, GRAMMARS, SLOW, LOOP_LAG, PROCESS, FDS, THREADS, RSS,
    HTTP_REQUESTS, HTTP_SECONDS, HTTP_FINE_SECONDS, HTTP_IN, HTTP_OUT, *GC)
