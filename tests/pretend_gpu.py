"""A GPU that is pretended, for machines without one.

Its tensors keep their numbers on the CPU, say that they are on `pretend:0`, and refuse what a GPU's refuse: to meet tensors of
the CPU in one operation, to be drawn by a generator of the CPU, to be read by numpy. It does not tell what kernels round, how
fast they are, how much memory they take.
"""
import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPYING = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", Backend())
PRETEND = torch.device("pretend", 0)


class PretendTensor(torch.Tensor):
    """`raw`, a tensor of the CPU, as if it were on the GPU."""

    @staticmethod
    def __new__(cls, raw):
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=PRETEND,
                                                     storage_offset=raw.storage_offset())
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return PretendTensor, (self.raw,)

    def tolist(self):
        return self.raw.tolist()

    def __repr__(self):
        return f"pretended {self.raw!r}"

    def __format__(self, specification):
        return format(self.raw, specification)


class Generator(torch.Generator):
    """One of the CPU that knows whose it is: operations get another object, with the same `_cdata`."""
    device_types = {}

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        cls.device_types[generator._cdata] = torch.device(device).type
        return generator


def run(function, args, kwargs):
    """What the CPU gives, and on the device where a GPU would have put it."""
    there, here = [], []

    def unwrap(x):
        if isinstance(x, PretendTensor):
            there.append(x)
            return x.raw
        if isinstance(x, torch.Tensor) and x.dim():  # single numbers may be anywhere
            here.append(x)
        return type(x)(map(unwrap, x)) if isinstance(x, (list, tuple)) else x

    raw = unwrap(args), {name: unwrap(x) for name, x in kwargs.items()}
    if kwargs.get("device") is not None:
        on_gpu, raw[1]["device"] = torch.device(kwargs["device"]).type == "pretend", "cpu"
    else:
        on_gpu = isinstance(args[0], PretendTensor) if function in COPYING or function in INDEXING else bool(there)
    if there and function not in COPYING:
        strangers = here if on_gpu else there
        if on_gpu and function in INDEXING:
            strangers = [x for x in strangers if x.is_floating_point()]  # a GPU's tensor may be indexed by the CPU's
        if strangers:
            raise RuntimeError(f"{function}: tensors of two devices, {[(tuple(x.shape), str(x.device)) for x in there + here]}")
    generator = kwargs.get("generator")
    if generator is not None and Generator.device_types.get(generator._cdata, "cpu") != ("pretend" if on_gpu else "cpu"):
        raise RuntimeError(f"{function}: a generator of another device")
    changed_in_place = {id(x.raw): x for x in there}

    def wrap(x):
        if isinstance(x, torch.Tensor):
            return changed_in_place[id(x)] if id(x) in changed_in_place else PretendTensor(x)
        return type(x)(map(wrap, x)) if isinstance(x, (list, tuple)) else x

    result = function(*raw[0], **raw[1])
    return wrap(result) if on_gpu else result


LIBRARIES = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")  # registered as long as they live
LIBRARIES[0].fallback(lambda function, *args, **kwargs: run(function, args, kwargs), "PrivateUse1")
LIBRARIES[1].impl("_to_copy", lambda *args, **kwargs: run(aten._to_copy.default, args, kwargs), "PrivateUse1")
