"""The type query against tables that an unpatched llama-quantize wrote (make_quant_types.py)."""

import ctypes
import json
import random
from pathlib import Path

import llama_cpp
import pytest

LIBRARY = llama_cpp.llama_cpp._lib

TABLE = json.loads(Path(__file__).with_name("quant_types.json").read_text())
FTYPES = TABLE["ftypes"]
F32, BF16, Q8_0 = 0, 30, 8

# Below 4 bits, or by an importance matrix, the recipes refuse tensors of these types without importance data.
NEED_IMATRIX = {"iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s", "iq1_m", "iq1_s"}


class Desc(ctypes.Structure):
    _fields_ = [("arch", ctypes.c_char_p)] + [
        (name, ctypes.c_uint32)
        for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert", "n_embd_head_k", "n_embd_head_v")
    ]


class Tensor(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("ne", ctypes.c_int64 * 4)]


query = LIBRARY.ziggurat_quant_types
query.restype = ctypes.c_int32
query.argtypes = [
    ctypes.POINTER(Desc),
    ctypes.c_int32,
    ctypes.c_bool,
    ctypes.POINTER(Tensor),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_int32),
    ctypes.POINTER(ctypes.c_uint8),
    ctypes.c_char_p,
    ctypes.c_size_t,
]


@pytest.fixture(scope="module")
def type_name():
    function = LIBRARY.ggml_type_name
    function.restype = ctypes.c_char_p
    return lambda number: function(number).decode()


@pytest.fixture(autouse=True)
def quiet():
    """Fallbacks to other types are logged by llama.cpp as warnings."""
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    yield
    from llama_cpp._logger import llama_log_callback

    llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))


def ask(desc, ftype, tensors, imatrix=False):
    """The types and which tensors need importance data, by name; or the message."""
    array = (Tensor * len(tensors))()
    for i, (name, kind, shape) in enumerate(tensors):
        array[i] = Tensor(name.encode(), kind, (ctypes.c_int64 * 4)(*shape, *[1] * (4 - len(shape))))
    types, needs = (ctypes.c_int32 * len(tensors))(), (ctypes.c_uint8 * len(tensors))()
    error = ctypes.create_string_buffer(200)
    if query(ctypes.byref(desc), ftype, imatrix, array, len(tensors), types, needs, error, len(error)) != 0:
        assert error.value
        return error.value.decode()
    names = [name for name, _, _ in tensors]
    return dict(zip(names, types, strict=True)), {n for n, need in zip(names, needs, strict=True) if need}


def desc_of(model):
    head = model.get("h", 256) // model["heads"]
    return Desc(
        model["arch"].encode(),
        model.get("h", 256),
        model.get("ff", 256),
        model["n_layer"],
        model["heads"],
        model["kv"],
        model.get("experts", 0),
        head,
        head,
    )


def expand(pattern, n_layer):
    return [pattern.replace("*", str(i)) for i in range(n_layer)] if "*" in pattern else [pattern]


def tensors_of(entry):
    """The model's tensors in an order of no meaning."""
    result = [
        (name, F32 if len(shape) == 1 else BF16, shape)
        for pattern, shape in entry["tensors"].items()
        for name in expand(pattern, entry["model"]["n_layer"])
    ]
    random.Random(0).shuffle(result)
    return result


def unpacked(case, n_layer):
    result = {}
    for runs, patterns in case.items():
        kinds = [kind for run in runs.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]
        for pattern in patterns:
            result |= zip(expand(pattern, n_layer), kinds, strict=True)
    return result


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("name", TABLE["models"])
def test_every_type_is_the_quantizers(name, imatrix, type_name):
    entry = TABLE["models"][name]
    tensors = tensors_of(entry)
    own = {name: type_name(kind) for name, kind, _ in tensors}
    for ftype, plain in entry["plain"].items():
        case = entry["imatrix"].get(ftype, plain) if imatrix else plain
        types, needs = ask(desc_of(entry["model"]), FTYPES[ftype], tensors, imatrix)
        found = {name: type_name(kind) for name, kind in types.items()}
        assert found == own | unpacked(case, entry["model"]["n_layer"]), ftype
        if not imatrix:
            assert bool(needs) == (ftype in entry["needs imatrix"]), ftype
        expected = NEED_IMATRIX | ({"q2_K"} if ftype == "Q2_K_S" else set())
        embeddings = {"token_embd.weight", "output.weight"}
        assert needs == {name for name, kind in found.items() if kind in expected} - embeddings, ftype


ENTRY = TABLE["models"]["llama"]
ONE = [("blk.0.attn_q.weight", BF16, [256, 256])]


def changed(**fields):
    desc = desc_of(ENTRY["model"])
    for key, value in fields.items():
        setattr(desc, key, value)
    return desc


@pytest.mark.parametrize(
    ("fields", "ftype", "tensors", "message"),
    [
        (dict(arch=b"no-such"), 15, ONE, "unknown model architecture: 'no-such'"),
        (dict(arch=b"(unknown)"), 15, ONE, "unknown model architecture: '(unknown)'"),
        (dict(arch=None), 15, ONE, "no architecture given"),
        (dict(n_layer=0), 15, ONE, "n_layer is 0; it must be between 1 and 512"),
        (dict(n_layer=513), 15, ONE, "n_layer is 513; it must be between 1 and 512"),
        (dict(), 999, ONE, "invalid output file type 999"),
        (dict(), -1, ONE, "invalid output file type -1"),
        (dict(), 15, ONE * 2, "tensor 'blk.0.attn_q.weight' is given twice"),
        (dict(), 15, [("x" * 64, BF16, [256])], "is longer than 63 bytes"),
        (dict(), 15, [("x", 4, [256])], "tensor 'x' has the unknown type 4"),
        (dict(), 15, [("x", 1000, [256])], "tensor 'x' has the unknown type 1000"),
        (dict(), 15, [("x", -1, [256])], "tensor 'x' has the unknown type -1"),
        (dict(), 15, [("x", BF16, [0, 256])], "tensor 'x' has an impossible shape"),
        (dict(), 15, [("x", BF16, [-1, 256])], "tensor 'x' has an impossible shape"),
        (dict(), 15, [("x", BF16, [2**62, 4])], "tensor 'x' has an impossible shape"),
        (dict(), 15, [("x", Q8_0, [100, 4])], "tensor 'x' of type q8_0 must have a multiple of 32 columns"),
        (dict(), 15, [("x.weight", Q8_0, [256, 4])], "requantizing from type q8_0 is disabled"),
        (dict(n_expert=8), 15, [("ffn_down.weight", BF16, [256, 4])], "Failed to determine layer for tensor"),
        (dict(n_expert=8), 15, [("blk.9.ffn_down.weight", BF16, [256, 4])], "Bad layer 9 for tensor"),
    ],
)
def test_mistakes_come_back_as_messages(fields, ftype, tensors, message):
    assert message in ask(changed(**fields), ftype, tensors)


def test_null_pointers_and_a_short_buffer():
    types = (ctypes.c_int32 * 1)()
    tensors = (Tensor * 1)(Tensor(b"a", BF16, (ctypes.c_int64 * 4)(1, 1, 1, 1)))
    error = ctypes.create_string_buffer(b"untouched", 10)
    assert query(None, 15, False, tensors, 1, types, None, error, 5) == 1
    assert error.raw == b"a re\0ched\0"
    assert query(changed(), 15, False, None, 1, types, None, None, 0) == 1
    assert query(changed(), 15, False, tensors, 1, types, None, None, 0) == 0
    assert query(changed(), 15, False, None, 0, None, None, None, 0) == 0
    unnamed = (Tensor * 1)()
    assert query(changed(), 15, False, unnamed, 1, types, None, error, 10) == 1


def test_a_model_without_attention():
    desc = changed(arch=b"mamba", n_head=0, n_head_kv=0, n_embd_head_k=0, n_embd_head_v=0)
    types, _ = ask(desc, FTYPES["Q4_K_M"], [("blk.0.ssm_in.weight", BF16, [256, 512])])
    assert types == {"blk.0.ssm_in.weight": 12}


def test_the_default_type_of_a_file_type():
    default = LIBRARY.ziggurat_ftype_default_type
    assert [default(n) for n in (0, 1, 15, 30)] == [0, 1, 12, 23]
    assert default(4) == default(999) == default(-5) == -1


def test_the_rules_for_70b_models_are_all_known(upstream):
    """Upstream sets the size of a 70B model in these architectures; the query repeats the rules of each."""
    models = upstream / "vendor/llama.cpp/src/models"
    setting = {path.stem for path in models.glob("*.cpp") if "LLM_TYPE_70B" in path.read_text()}
    assert setting == {"llama", "qwen2", "deci", "olmo", "jais2"}
