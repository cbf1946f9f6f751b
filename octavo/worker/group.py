"""Worker groups: how plans reach the devices. One local device for now, a CPU or a GPU.

Owns the way of a plan to the runner and of its result back; it does not know what is in them. Invariant: plans and
registrations are carried out in the order in which they were given, and every Pending answers once its step has ended,
with a result or with the exception that ended it.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from octavo.config import EngineConfig
from octavo.models.source import ModelSource
from octavo.plan import Constraint, GroupInfo, StepPlan, StepResult
from octavo.worker.cuda_runner import CudaRunner
from octavo.worker.gpu import check_gpu
from octavo.worker.logit_edits import Processor
from octavo.worker.memory import SERVING, resolve_device
from octavo.worker.pending import DevicePending
from octavo.worker.runner import ModelRunner, check_cpu


class Pending:
    """A step that was submitted."""

    def __init__(self, future: "Future[StepResult]") -> None:
        self._future = future

    def done(self) -> bool:
        """Whether ``result`` would answer at once."""
        return self._future.done()

    def result(self) -> StepResult:
        """Wait for the step; raises what the step raised."""
        return self._future.result()


class LocalGroup:
    """One device in this process: a CPU, whose steps run inside ``submit``, or in one background thread.

    Args:
        config: options. source: the model. asynchronous: carry plans out in one background thread, in order, so that
            the engine overlaps with the step; the default runs a step inside ``submit``, because on a CPU there is
            nothing to overlap with. runner: used instead of making one (tests).

    Attributes:
        info: what the engine has to know. asynchronous: whether ``submit`` returns before the step has run.
    """

    def __init__(
        self,
        config: EngineConfig,
        source: ModelSource,
        *,
        asynchronous: bool = False,
        runner: ModelRunner | None = None,
    ) -> None:
        self.runner = runner or ModelRunner(config, source)
        self.info: GroupInfo = self.runner.info
        self.asynchronous = asynchronous
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-worker") if asynchronous else None
        self._closed = False

    def submit(self, plan: StepPlan) -> Pending:
        """Carry out a plan now, or after those before it; RuntimeError once closed."""
        self._check_open()
        if self._thread is not None:
            return Pending(self._thread.submit(self.runner.run, plan))
        future: Future[StepResult] = Future()
        try:
            future.set_result(self.runner.run(plan))
        except Exception as error:
            future.set_exception(error)
        return Pending(future)

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Processor], constraint: Constraint | None = None
    ) -> None:
        """Register what the host has for a row; call it before submitting the plan that starts the row."""
        self._check_open()
        if self._thread is None:
            self.runner.set_processors(row, generation, processors, constraint)
        else:  # in order, without waiting: a registration that fails is found by the plan that starts the row
            self._thread.submit(self.runner.set_processors, row, generation, processors, constraint)

    def host_ready(self) -> bool:
        """Host memory takes blocks from the start."""
        return True

    def expect_host(self) -> None:
        """Nothing has to be made ready."""

    def close(self) -> None:
        """Wait for what was submitted and refuse more. Closing twice is allowed."""
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the worker group is closed.")


class GpuGroup:
    """One GPU in this process: ``submit`` launches a step and returns, in the calling thread.

    Args:
        config: options. source: the model. runner: used instead of making one (tests).

    Attributes:
        info, asynchronous: as of LocalGroup. runner: the GPU.
    """

    def __init__(self, config: EngineConfig, source: ModelSource, *, runner: CudaRunner | None = None) -> None:
        self.runner = runner or CudaRunner(config, source)
        self.info: GroupInfo = self.runner.info
        self.asynchronous = True
        self._closed = False

    def submit(self, plan: StepPlan) -> DevicePending:
        """Launch a plan after those before it; RuntimeError once closed, or when it contradicts the tables."""
        self._check_open()
        return self.runner.submit(plan)

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Processor], constraint: Constraint | None = None
    ) -> None:
        """Register what the host has for a row; call it before submitting the plan that starts the row."""
        self._check_open()
        self.runner.set_processors(row, generation, processors, constraint)

    def host_ready(self) -> bool:
        """Whether blocks can move to host memory without waiting for its pinning."""
        return self.runner.host_ready()

    def expect_host(self) -> None:
        """Make host memory ready: blocks will move there before long."""
        self.runner.expect_host()

    def close(self) -> None:
        """Wait for what was submitted and refuse more. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self.runner.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the worker group is closed.")


Group = LocalGroup | GpuGroup


def check_supported(config: EngineConfig) -> None:
    """ConfigError when this machine or this version cannot do what the options ask; nothing is loaded but kernels."""
    if resolve_device(config) == "cuda":
        check_gpu(config)
    else:
        check_cpu(config)


def for_serving(config: EngineConfig) -> EngineConfig:
    """The options with the defaults of a server, which on a GPU runs fewer rows and shorter steps than a batch."""
    if resolve_device(config) != "cuda":
        return config
    rows, tokens = SERVING
    rows = config.max_num_seqs or min(rows, config.max_num_batched_tokens or rows)
    if config.max_num_batched_tokens is None and config.enable_chunked_prefill:
        config = config.replace(max_num_batched_tokens=max(rows, tokens))
    return config.replace(max_num_seqs=rows)


def make_group(config: EngineConfig, source: ModelSource) -> Group:
    """The group that the configured device asks for."""
    return GpuGroup(config, source) if resolve_device(config) == "cuda" else LocalGroup(config, source)
