"""``octavo plan MODEL``: where every byte of a device will go, before anything is loaded and without a GPU.

Owns the table on the screen; the arithmetic is the worker's own (``worker.memory``). Invariant: no weight is read, and
what is printed is what an engine with the same options would allocate on that device.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from octavo.commands.console import print_table
from octavo.commands.options import add_engine_args
from octavo.config import EngineConfig, human_int
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.worker.machine import Machine
    from octavo.worker.memory import MemoryPlan


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan", help="show where memory will go",
        description="Show where every byte of a device will go. Needs the model's config only, and no GPU.")
    parser.add_argument("--device-memory", type=human_int, metavar="BYTES",
                        help="plan for a device with so much memory, such as 80G; default: this machine")
    add_engine_args(parser, model="positional")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compute and print the plan."""
    config = EngineConfig.from_cli_args(args)
    if args.device_memory is not None and args.device_memory < 1:
        raise ConfigError(f"device_memory must be at least 1, got {args.device_memory}.", "device_memory")
    from octavo.models.hub import resolve  # these load torch, which --help and a wrong flag must not
    from octavo.models.registry import spec
    from octavo.worker.memory import plan_memory, resolve_dtype

    # "dummy" keeps a hub id from downloading weights; the plan itself does not depend on where they would come from.
    source = resolve(config if config.load_format == "gguf" else config.replace(load_format="dummy"))
    machine = _machine(config, args.device_memory)
    plan = plan_memory(spec(source.config), config, resolve_dtype(config, source), machine)
    show(config.model, machine, plan)
    return 0


def _machine(config: EngineConfig, device_memory: int | None) -> "Machine":
    """The device to plan for: this machine's, or one of the configured kind with ``device_memory``."""
    import torch

    from octavo.worker.machine import Machine, machine_memory
    from octavo.worker.memory import resolve_device

    host, device = machine_memory(), resolve_device(config)
    if device_memory is not None:
        return dataclasses.replace(host, device=device, total=device_memory, available=device_memory)
    if device == host.device:
        return host
    if not torch.cuda.is_available():
        raise ConfigError(f"device_memory must be given to plan for device {device!r}, such as --device-memory 80G.",
                          "device_memory")
    free, total = torch.cuda.mem_get_info()
    return Machine(device, int(total), int(free), host.total)


def show(model: str, machine: "Machine", plan: "MemoryPlan") -> None:
    """Print the table and what follows from it."""
    from octavo.worker.machine import size_text

    rows = [(row.name, size_text(row.bytes), row.how) for row in plan.rows]
    host = ("host pool", size_text(plan.host.bytes), f"{plan.host.how}, for swapped requests and evicted prefixes")
    left = f"of {size_text(machine.available)} available"
    if machine.device == "cpu":  # one memory holds both pools
        rows += [host, ("total", size_text(plan.total + plan.host.bytes), f"all of the above, host pool included, {left}")]
    else:
        rows += [("total", size_text(plan.total), f"all of the above, {left}"), (host[0], host[1], f"in host memory: {host[2]}")]
    print_table(f"Memory of {model} on a {machine.device} device", ("part", "size", "how"), rows, numeric={1})
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (plan.dtype, plan.kv_dtype)]
    one = plan.full_sequences == 1
    fitting = f"{plan.full_sequences:,} such {'sequence fits' if one else 'sequences fit'} at once"
    facts = [
        ("weights, KV cache", f"{dtypes[0]}, {dtypes[1]}"),
        ("KV of a token", size_text(plan.block_bytes // plan.block_size)),
        ("tokens that fit", f"{plan.tokens:,} in {plan.num_blocks:,} blocks of {plan.block_size}"),
        ("longest sequence", f"{plan.max_model_len:,} tokens; {fitting}"),
        ("a step", f"at most {plan.max_num_seqs:,} sequences, {plan.max_num_batched_tokens:,} tokens"),
    ]
    if plan.window_waste:
        waste = f"{size_text(plan.window_waste)} of a longest sequence's KV, by layers whose window has passed it"
        facts.append(("kept in vain", waste))
    print()
    for name, text in facts:
        print(f"  {name:<18} {text}")
    for note in plan.notes:
        print(f"  Note: {note}")
