"""The text of compiled programs: hand-written modules whose counts are known, and real ones."""

import jax
import jax.numpy as jnp
import pytest

from ssl_jax import hlo, parallel
from ssl_jax.hlo import Array, Collective, Instruction


@pytest.mark.parametrize(
    ("line", "instruction"),
    [
        ("  %x.1 = f32[] parameter(0)", Instruction("x.1", "parameter", (Array("f32", ()),), ("0",), {})),
        (
            "  ROOT %dot.3 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} dot(%a, f32[128,4]{1,0} %b), "
            "lhs_contracting_dims={1}, dim_labels=b0f_0io->b0f",
            Instruction(
                "dot.3",
                "dot",
                (Array("bf16", (8, 128)),),
                ("a", "b"),
                {"lhs_contracting_dims": "{1}", "dim_labels": "b0f_0io->b0f"},
            ),
        ),
        (
            "  all-gather-start.2 = ((f32[2,8]{1,0}), (f32[8,8]{1,0}), /*index=2*/u32[]) all-gather-start(x), "
            "channel_id=4, replica_groups=mesh['data'=4,'shard'=1] {'data'}, dimensions={0}",
            Instruction(
                "all-gather-start.2",
                "all-gather-start",
                (Array("f32", (2, 8)), Array("f32", (8, 8)), Array("u32", ())),
                ("x",),
                {"channel_id": "4", "replica_groups": "mesh['data'=4,'shard'=1] {'data'}", "dimensions": "{0}"},
            ),
        ),
        (
            r'  %y = pred[3]{0} custom-call(), custom_call_target="a, \"(b", metadata={op_name="jit(f)/{x" line=3}',
            Instruction(
                "y",
                "custom-call",
                (Array("pred", (3,)),),
                (),
                {"custom_call_target": r'"a, \"(b"', "metadata": '{op_name="jit(f)/{x" line=3}'},
            ),
        ),
        (
            "  %c = s32[2,2]{1,0} constant({ {1, 2}, {3, 4} })",
            Instruction("c", "constant", (Array("s32", (2, 2)),), ("{ {1, 2}, {3, 4} }",), {}),
        ),
    ],
)
def test_an_instruction(line, instruction):
    assert hlo.parse_instruction(line) == instruction


@pytest.mark.parametrize("line", ["  what is this?", "  %x = f32[2]{0} add(%a, %b", "  %x = f32[2]{0}", ""])
def test_what_is_no_instruction_is_an_error(line):
    with pytest.raises(ValueError, match="^HLO: "):
        hlo.parse_instruction(line)


def test_an_unknown_line_in_a_computation_is_an_error():
    with pytest.raises(ValueError, match=r"HLO: not an instruction: \?"):
        hlo.parse("ENTRY %main (x: f32[]) -> f32[] {\n  ?\n}\n")
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (Array("f32", (8, 128)), 4096), (Array("bf16", ()), 2), (Array("pred", (3,)), 3), (Array("s4", (6,)), 3),
        (Array("f8e4m3fn", (5,)), 5), (Array("c64", (2,)), 16), (Array("token", ()), 0), (Array("f32", (0, 4)), 0),
    ],
)  # fmt: skip
def test_bytes_of_an_array(array, size):
    assert array.bytes == size


# 5 rounds of a loop around 3 rounds of another; `shared` runs in both and once by itself.
LOOPS = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%shared (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-reduce.1 = f32[4]{0:T(128)} all-reduce(%p), channel_id=1, to_apply=%add
}

%inner (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %call.1 = (s32[], f32[4]{0}) call(%p.1), to_apply=%shared
}

%going_on (p.2: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (p.3: (s32[], f32[4])) -> (s32[], f32[4]) {
  %call.2 = f32[4]{0} call(%x), to_apply=%shared
  ROOT %while.1 = (s32[], f32[4]{0}) while(%p.3), condition=%going_on, body=%inner, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
}

%never (p.4: f32[4]) -> f32[4] {
  ROOT %all-gather.9 = f32[16]{0} all-gather(%p.4), channel_id=9, dimensions={0}
}

ENTRY %main (x.1: f32[4]) -> f32[4] {
  %while.2 = (s32[], f32[4]{0}) while(%t), condition=%going_on, body=%outer, \
backend_config="{\\"known_trip_count\\":{\\"n\\":\\"5\\"}}"
  %endless = (s32[], f32[4]{0}) while(%t), condition=%going_on, body=%inner
  ROOT %conditional = f32[4]{0} conditional(%i, %x, %y), branch_computations={%shared, %inner}
}, execution_thread="main"
"""


def test_a_computation_runs_as_often_as_its_loops():
    counts = hlo.run_counts(hlo.parse(LOOPS))
    inner = 5 * 3 + 1 + 1  # both loops; the one of unknown length; a branch
    shared = inner + 5 + 1  # and once per round of the outer loop, and as a branch
    assert counts["inner"] == inner and counts["shared"] == shared and counts["outer"] == 5
    assert counts["add"] == shared and counts["main"] == 1 and counts["never"] == 0
    assert counts["going_on"] == 5 * 4 + 6 + 2  # a condition is asked once more than its body runs
    assert list(hlo.collectives(hlo.parse(LOOPS))) == [("all-reduce", shared, 16.0), ("all-gather", 0, 64.0)]


# As the TPU compiler writes a gather that two fusions hide.
SPREAD = """
%async_collective_fusion.1 (param_0: f32[16,8], param_1: f32[64,8]) -> f32[64,8] {
  %all-gather.18 = f32[64,8]{1,0} all-gather(%param_0), channel_id=4, dimensions={0}
}
%async_collective_fusion.2 (param_0: f32[16,8], param_1: f32[64,8]) -> f32[64,8] {
  %all-gather.20 = f32[64,8]{1,0} all-gather(%param_0), channel_id=4, dimensions={0}
}
ENTRY %main (x: f32[16,8]) -> f32[64,8] {
  %fusion.1 = f32[64,8]{1,0} fusion(%x, %buffer), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = f32[64,8]{1,0} fusion(%x, %fusion.1), kind=kCustom, calls=%async_collective_fusion.2
  %all-gather.21 = f32[64,8]{1,0} all-gather(%x), channel_id=5, dimensions={0}
}
"""


def test_a_collective_spread_over_fusions_is_one():
    assert list(hlo.collectives(hlo.parse(SPREAD))) == [("all-gather", 1, 2048.0)] * 2


ASYNCHRONOUS = """
%scatter (p: f32[64,8]) -> f32[16,8] {
  ROOT %reduce-scatter.1 = f32[16,8]{1,0} reduce-scatter(%p), channel_id=1, dimensions={0}, to_apply=%add
}
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%a, %b)
}
ENTRY %main (x: f32[16,8], y: bf16[16]) -> f32[64,8] {
  %gather = (f32[16,8]{1,0}, f32[64,8]{1,0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %gathered = f32[64,8]{1,0} all-gather-done(%gather)
  %both = ((f32[16,8]{1,0}, bf16[16]{0}), (f32[64,8]{1,0}, bf16[64]{0})) all-gather-start(%x, %y), channel_id=3
  %sums = (f32[16,8]{1,0}, bf16[16]{0}) all-reduce-start(%x, %y), channel_id=4, to_apply=%add
  %summed = (f32[16,8]{1,0}, bf16[16]{0}) all-reduce-done(%sums)
  %move = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=5
  %moved = f32[16,8]{1,0} collective-permute-done(%move)
  %start = ((f32[64,8]{1,0}), f32[16,8]{1,0}, s32[]) async-start(%gathered), calls=%scatter
  %update = ((f32[64,8]{1,0}), f32[16,8]{1,0}, s32[]) async-update(%start), calls=%scatter
  ROOT %done = f32[16,8]{1,0} async-done(%update), calls=%scatter
}
"""


def test_asynchronous_pairs_count_once_with_what_comes_out():
    x, y = 16 * 8 * 4, 16 * 2
    assert list(hlo.collectives(hlo.parse(ASYNCHRONOUS))) == [
        Collective("reduce-scatter", 1, x),
        Collective("all-gather", 1, 4 * x),
        Collective("all-gather", 1, 4 * (x + y)),
        Collective("all-reduce", 1, x + y),
        Collective("collective-permute", 1, x),
    ]


def test_collectives_of_a_real_program_with_a_loop():
    """Four devices: a sum in each of five rounds, and one gather after it."""
    mesh = parallel.make_mesh(4, 4)

    def step(x):
        def one(total, _):
            return total + jnp.sum(x * total), None

        return jax.lax.scan(one, jnp.float32(1), None, length=5)[0] + x

    jitted = jax.jit(step, in_shardings=parallel.batch_sharding(mesh), out_shardings=parallel.replicated(mesh))
    text = jitted.lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
    module = hlo.parse(text)
    assert sorted(hlo.collectives(module)) == [("all-gather", 1, 32.0), ("all-reduce", 5, 4.0)]
    # Nothing of the text is lost.
    instructions = [one for computation in module.computations.values() for one in computation]
    assert len(instructions) == sum(" = " in line for line in text.splitlines())
    assert all(one.results for one in instructions if one.opcode != "tuple")
    assert {one.opcode for one in module.computations[module.entry]} >= {"parameter", "while"}
