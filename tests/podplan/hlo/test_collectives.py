"""Collectives as the TPU compiler writes them, in programs of a few lines.

Those of real programs are compared in `tests/podplan/test_compile.py`.
"""

from mvit_jax.podplan.hlo import cost

ADD = """\
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(*computations: str) -> str:
    return "\n\n".join(["HloModule jit_step, num_partitions=16", ADD, *computations])


def scatter(number: int) -> str:
    """Returns a sum of two arrays over 4 chips, each of which keeps a quarter of both."""
    return f"""\
%all-reduce-scatter.{number} (a: f32[8,128], b: f32[16,128]) -> (f32[2,128], f32[4,128]) {{
  %a = f32[8,128]{{1,0}} parameter(0)
  %b = f32[16,128]{{1,0}} parameter(1)
  %sums = (f32[8,128]{{1,0}}, f32[16,128]{{1,0}}) all-reduce(%a, %b), channel_id=1, \
replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
  %a.sum = f32[8,128]{{1,0}} get-tuple-element(%sums), index=0
  %b.sum = f32[16,128]{{1,0}} get-tuple-element(%sums), index=1
  %zero = s32[] constant(0)
  %a.part = f32[2,128]{{1,0}} dynamic-slice(%a.sum, %zero, %zero), dynamic_slice_sizes={{2,128}}
  %b.part = f32[4,128]{{1,0}} dynamic-slice(%b.sum, %zero, %zero), dynamic_slice_sizes={{4,128}}
  ROOT %parts = (f32[2,128]{{1,0}}, f32[4,128]{{1,0}}) tuple(%a.part, %b.part)
}}"""


def test_sliced_sums_of_several_arrays_are_reduce_scatters():
    """Two of them share a channel, as in programs whose collectives were combined."""
    entry = """\
ENTRY %main (a: f32[8,128], b: f32[16,128]) -> (f32[2,128], f32[4,128]) {
  %a = f32[8,128]{1,0} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %b = f32[16,128]{1,0} parameter(1), metadata={op_name="batch[\\'clip\\']"}
  %first = (f32[2,128]{1,0}, f32[4,128]{1,0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %second = (f32[2,128]{1,0}, f32[4,128]{1,0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.2
}"""  # noqa: E501
    counts = cost.count(program(scatter(1), scatter(2), entry))
    assert [(c.kind, c.bytes, c.devices) for c in counts.collectives] == [
        ("reduce-scatter", 4 * 24 * 128, 4)
    ] * 2
    # Each reads both arrays and writes a quarter of them.
    assert counts.bytes == 2 * 4 * (24 + 6) * 128
    assert counts.arguments == (("state.params['w']", 4096), ("batch['clip']", 8192))


BUFFERS = "(f32[8,128]{1,0}, f32[32,128]{1,0}, u32[])"
ASYNC = (
    f"""\
%start (a: f32[8,128]) -> {BUFFERS} {{
  %a = f32[8,128]{{1,0}} parameter(0)
  %all = f32[32,128]{{1,0}} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[16], \
dimensions={{0}}
  ROOT %begun = {BUFFERS} custom-call(%all), custom_call_target="AsyncCollectiveStart"
}}""",
    """\
%step (a: f32[8,128], into: f32[32,128], flag: u32[], x: f32[64]) -> (f32[64], f32[8,128], \
f32[32,128], u32[]) {
  %a = f32[8,128]{1,0} parameter(0)
  %into = f32[32,128]{1,0} parameter(1)
  %flag = u32[] parameter(2)
  %x = f32[64]{0} parameter(3)
  %twice = f32[64]{0} add(%x, %x)
  %all = f32[32,128]{1,0} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %out = (f32[64]{0}, f32[8,128]{1,0}, f32[32,128]{1,0}, u32[]) tuple(%twice, %a, %all, %flag)
}""",
    """\
%done (a: f32[8,128], into: f32[32,128], flag: u32[]) -> f32[32,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %into = f32[32,128]{1,0} parameter(1)
  %flag = u32[] parameter(2)
  %all = f32[32,128]{1,0} all-gather(%a), channel_id=7, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %got = f32[32,128]{1,0} custom-call(%a, %into, %all, %flag), custom_call_target=\
"AsyncCollectiveDone"
}""",
    f"""\
ENTRY %main (a: f32[8,128], x: f32[64]) -> f32[32,128] {{
  %a = f32[8,128]{{1,0}} parameter(0)
  %x = f32[64]{{0}} parameter(1)
  %begin = {BUFFERS} fusion(%a), kind=kCustom, calls=%start
  %a.1 = f32[8,128]{{1,0}} get-tuple-element(%begin), index=0
  %all.1 = f32[32,128]{{1,0}} get-tuple-element(%begin), index=1
  %flag.1 = u32[] get-tuple-element(%begin), index=2
  %meanwhile = (f32[64]{{0}}, f32[8,128]{{1,0}}, f32[32,128]{{1,0}}, u32[]) fusion(%a.1, %all.1, \
%flag.1, %x), kind=kOutput, calls=%step
  %a.2 = f32[8,128]{{1,0}} get-tuple-element(%meanwhile), index=1
  %all.2 = f32[32,128]{{1,0}} get-tuple-element(%meanwhile), index=2
  %flag.2 = u32[] get-tuple-element(%meanwhile), index=3
  ROOT %end = f32[32,128]{{1,0}} fusion(%a.2, %all.2, %flag.2), kind=kCustom, calls=%done
}}""",
)


def test_an_asynchronous_collective_is_counted_once():
    counts = cost.count(program(*ASYNC))
    (gather,) = counts.collectives
    assert (gather.kind, gather.bytes, gather.devices) == ("all-gather", 4 * 32 * 128, 4)
    assert not counts.kernels
    # The all-gather's input and output, and 64 numbers read and 64 written; flags aside.
    moved = 4 * (8 + 32) * 128 + 2 * 4 * 64
    assert moved <= counts.bytes <= moved + 32
    assert counts.flops == 64


def test_replica_groups_with_device_ids_are_parsed():
    entry = """\
ENTRY %main (a: f32[8,128]) -> f32[32,128] {
  %a = f32[8,128]{1,0} parameter(0)
  ROOT %all = f32[32,128]{1,0} all-gather(%a), channel_id=2, replica_groups=mesh['axis_0'=1,\
'axis_1'=4,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_1'}, dimensions={0}
}"""
    (gather,) = cost.count(program(entry)).collectives
    assert gather.devices == 4


def test_sends_between_slices_are_counted_as_a_collective():
    entry = """\
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %id = u32[] custom-call(), custom_call_target="SliceId"
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_target="{1,2,3,4}x{0:255}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",\
_xla_megascale_target="{1,2,3,4}x{0:255}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (f32[8,128]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[8,128]{1,0} get-tuple-element(%received), index=0
}"""
    counts = cost.count(program(entry))
    (summed,) = counts.collectives
    assert (summed.kind, summed.bytes, summed.devices) == ("all-reduce", 4096, 4)
    assert summed.between_slices and not counts.kernels


def test_an_ordinary_send_is_not_counted_as_a_collective():
    entry = """\
ENTRY %main (a: f32[8,128]) -> token[] {
  %a = f32[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true
  ROOT %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
}"""
    assert cost.count(program(entry)).collectives == ()
