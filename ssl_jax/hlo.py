"""Reads the text of a compiled XLA program: its computations, how often each runs, and what travels between devices.

The text of `jax.stages.Compiled.as_text()` is the only description of a compiled program that JAX makes public. The
Python classes for it are private to jaxlib and have moved between versions; the protocol buffers come with TensorFlow.
Syntax: https://openxla.org/xla/hlo_dump_format. Instructions: https://openxla.org/xla/operation_semantics.
"""

import math
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from typing import NamedTuple


class Array(NamedTuple):
    """An array that an instruction returns; its memory layout is left out."""

    dtype: str  # such as f32, bf16, pred
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        if self.dtype == "pred":
            return float(math.prod(self.shape))
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # f32, s4, f8e4m3fn; a token has none
        return math.prod(self.shape) * int(bits[1]) / 8 if bits else 0.0


class Instruction(NamedTuple):
    """`name = results opcode(operands), attributes`."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # all arrays of nested tuples, in order
    operands: tuple[str, ...]  # names; for a constant its value, for a parameter its number
    attributes: dict[str, str]  # as text: {"channel_id": "4", "calls": "%fusion.1"}

    @property
    def calls(self) -> list[tuple[str, int]]:
        """(computation, how often it runs) for every computation this instruction runs.

        All branches of a conditional are counted, so what is counted in them is an upper bound.
        """
        if self.opcode.endswith(("-update", "-done")):  # they name the computation that their -start runs
            return []
        trips = re.search(r"known_trip_count\D*(\d+)", self.attributes.get("backend_config", ""))
        times = int(trips[1]) if trips and self.opcode == "while" else 1
        return [
            (name, times + 1 if attribute == "condition" else times)
            for attribute in CALLS
            for name in NAME.findall(self.attributes.get(attribute, ""))
        ]


class Module(NamedTuple):
    entry: str  # name of the computation where the program starts
    computations: dict[str, list[Instruction]]


class Collective(NamedTuple):
    """Communication between devices; `bytes` is the size of its result on each of them."""

    kind: str
    runs: int  # how often, in one run of the program
    bytes: float


CALLS = (
    *("calls", "to_apply", "called_computations", "body", "condition"),
    *("branch_computations", "true_computation", "false_computation"),
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

NAME = re.compile(r"[\w.\-]+")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")  # of a computation
ASSIGNED = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
OPENED = re.compile(r" ?([\w\-]+)\(")  # an opcode and the bracket of its operands
ARRAY = re.compile(r"(\w+)\[([^\]]*)\]")
COMMENT = re.compile(r"/\*index=\d+\*/")
# What decides where a part ends: brackets and commas, but not those inside of strings.
PUNCTUATION = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')


def parse(text: str) -> Module:
    """The module that `text` describes. Raises ValueError for a line in a computation that is no instruction."""
    entry, computations = "", dict[str, list[Instruction]]()
    current: list[Instruction] | None = None  # the computation that we are in
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and line.strip():
            current.append(parse_instruction(line))
    if not entry:
        raise ValueError("HLO: no ENTRY computation")
    return Module(entry, computations)


def parse_instruction(line: str) -> Instruction:
    """An instruction from its line of text."""
    line = COMMENT.sub("", line)
    assigned = ASSIGNED.match(line)
    start = assigned.end() if assigned else 0
    # A tuple's type has spaces in it, an array's has none.
    end = _closing(line, start) if line[start : start + 1] == "(" else line.find(" ", start)
    opened = OPENED.match(line, end)
    if not assigned or not opened:
        raise ValueError(f"HLO: not an instruction: {line.strip()[:200]}")
    close = _closing(line, opened.end() - 1)
    # Some versions write the type of an operand before its name.
    operands = [operand.rpartition(" %")[2].removeprefix("%") for operand in _split(line[opened.end() : close - 1])]
    attributes = [part.partition("=") for part in _split(line[close:])]
    return Instruction(
        assigned[1],
        opened[1],
        tuple(_array(*found) for found in ARRAY.findall(line[start:end])),
        tuple(operands),
        {name: value for name, _, value in attributes},
    )


def _array(dtype: str, shape: str) -> Array:
    return Array(dtype, tuple(int(size.strip().removeprefix("<=")) for size in shape.split(",") if size))


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for found in PUNCTUATION.finditer(text, start):
        depth += (found[0] in "([{") - (found[0] in ")]}")
        if depth == 0:
            return found.end()
    raise ValueError(f"HLO: a bracket is not closed: {text.strip()[:200]}")


def _split(text: str) -> list[str]:
    """The parts of `text` between commas that are in no bracket or string; empty ones are left out."""
    parts, depth, start = [], 0, 0
    for found in PUNCTUATION.finditer(text):
        if found[0] == "," and depth == 0:
            parts.append(text[start : found.start()])
            start = found.end()
        depth += (found[0] in "([{") - (found[0] in ")]}")
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def run_counts(module: Module) -> dict[str, int]:
    """How often each computation runs in one run of the program; loops whose length is not known count once."""
    calls = {
        name: [call for instruction in instructions for call in instruction.calls]
        for name, instructions in module.computations.items()
    }
    callers: dict[str, set[str]] = {name: set() for name in calls}
    for caller, called in calls.items():
        for name, _ in called:
            callers[name].add(caller)
    counts = dict.fromkeys(calls, 0)
    counts[module.entry] = 1
    for caller in TopologicalSorter(callers).static_order():  # every caller before what it calls
        for name, times in calls[caller]:
            counts[name] += times * counts[caller]
    return counts


def collectives(module: Module) -> Iterator[Collective]:
    """Every collective of the program. Those that share a channel are one.

    The TPU compiler hides a collective behind several fusions by spreading it over them: each holds a copy.
    """
    counts = run_counts(module)
    channels = set()
    for name, instructions in module.computations.items():
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            channel = instruction.attributes.get("channel_id")
            if kind not in COLLECTIVES or channel in channels:
                continue
            if channel:
                channels.add(channel)
            results = instruction.results
            if instruction.opcode.endswith("-start") and kind != "all-reduce":
                # It returns (what goes in, what comes out, scalars of its own).
                size = len(instruction.operands)
                results = results[size : 2 * size]
            yield Collective(kind, counts[name], sum(array.bytes for array in results))
