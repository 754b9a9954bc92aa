"""What the compiled kernels take: the structures of kernels.h, by the same names. Keep both alike."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Batch(Structure):
    """The rows of a step, as attention sees them."""

    _fields_ = (
        *_fields(c_void_p, "slot_mapping tables starts counts offsets"),
        *_fields(c_int32, "rows tokens table_width"),
    )


class Attention(Structure):
    """Attention of one layer in one step."""

    _fields_ = (
        ("batch", POINTER(Batch)),
        *_fields(c_void_p, "query key value key_cache value_cache out sinks"),
        *_fields(c_int64 * 2, "query_strides key_strides value_strides"),
        *_fields(c_int32, "heads kv_heads key_dim value_dim block_size window chunk"),
        *_fields(c_float, "scale softcap"),
        *_fields(c_void_p, "query_norm key_norm cos_sin"),
        *_fields(c_float, "norm_eps"),
        *_fields(c_int32, "rotated interleaved"),
    )


class Linear(Structure):
    """A linear layer, packed."""

    _fields_ = (*_fields(c_void_p, "weight bias scales"), *_fields(c_int64, "width depth"))


class Layer(Structure):
    """A layer of a decoder."""

    _fields_ = (
        *_fields(Linear, "qkv out gate_up down"),
        *_fields(c_void_p, "input_norm attention_norm mlp_norm mlp_out_norm"),
        ("attention", Attention),
        *_fields(c_int32, "group is_gelu"),
    )


class Seconds(Structure):
    """What steps spend, by the kind of kernel."""

    _fields_ = (*_fields(c_double, "linears attention norms activation"),)


class Decoder(Structure):
    """A decoder, and one step of it."""

    _fields_ = (
        *_fields(c_void_p, "layers norm"),
        ("head", Linear),
        *_fields(c_int64, "num_layers hidden int8_kind"),
        *_fields(c_float, "eps"),
        *_fields(c_int32, "threads"),
        *_fields(c_void_p, "batches residual logits sampled_at"),
        *_fields(c_int64, "sampled"),
        *_fields(c_void_p, "seconds"),
    )
