"""Pickles that would run something, crash NumPy, fill the memory or never end, written by hand; and those that are harmless."""

import io
import pickle
import pickletools
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest

from mla_fast.datasets.files import DecodeError, load_array
from mla_fast.datasets.npy import entries, load_names, load_npy
from mla_fast.datasets.pickles import LITERALS, Machine, load_plain

NONE, TRUE, FALSE, REDUCE, BUILD, LIST = b"N", b"\x88", b"\x89", b"R", b"b", b"]"


def name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


def integer(value):
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def many(*entries):
    return b"(" + b"".join(entries) + b"t"


def items(*entries):
    return b"](" + b"".join(entries) + b"e"


def call(module, attribute, *arguments):
    return name(module, attribute) + many(*arguments) + REDUCE


def dtype(code, order="<", structure=3 * NONE):
    state = many(integer(3), text(order), structure, integer(-1), integer(-1), integer(0))
    return call("numpy", "dtype", text(code), FALSE, TRUE) + state + BUILD


def shape(*sizes):
    return many(*map(integer, sizes))


def empty():
    return call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), shape(0), raw(b"b"))


def array(code, sizes, content):
    return empty() + many(integer(1), shape(*sizes), dtype(code), FALSE, content) + BUILD


def from_buffer(code, sizes, content, order="C"):
    return call("numpy.core.numeric", "_frombuffer", content, dtype(code), shape(*sizes), text(order))


def nested(first, again, close, depth):
    """A container in a container …, each entry twice where `again` gets it a second time: 2^depth in all."""
    return first + b"".join(b"q" + bytes([i]) + b"(" + (b"h" + bytes([i])) * again + close for i in range(depth))


def write(path, content):
    path.write_bytes(content + b".")
    return path


EXPONENTIAL = nested(LIST, 2, b"l", 60), nested(b")", 2, b"t", 60)
FIELDS = NONE + many(text("a")) + b"}(" + text("a") + many(dtype("O"), integer(2**40)) + b"u"
REFUSED = {
    "a call of ndarray on a buffer of objects": call("numpy", "ndarray", shape(1), dtype("O"), raw(b"A" * 8)),
    "objects of bytes": array("O", (1,), raw(b"A" * 8)),
    "objects of a buffer": from_buffer("O", (1,), raw(b"A" * 8)),
    "objects of a list in a buffer": from_buffer("O", (1,), items(integer(1))),
    "objects as a scalar": call("numpy.core.multiarray", "scalar", dtype("O"), raw(b"A" * 8)),
    "a list as a scalar": call("numpy.core.multiarray", "scalar", dtype("O"), LIST),
    "an array in an array of objects": array("O", (1,), items(array("O", (1,), items(NONE)))),
    "an array in an array of objects, filled later": array("O", (1,), items(empty())),
    "a list in an array of objects": array("O", (1,), items(LIST)),
    "a dtype with fields": dtype("i8", structure=FIELDS),
    "a dtype with a subarray": dtype("i8", structure=many(dtype("i8"), shape(2**30)) + NONE + NONE),
    "a dtype with metadata": call("numpy", "dtype", text("i8"), FALSE, TRUE)
    + many(integer(4), text("<"), 5 * NONE, 2 * LIST)
    + BUILD,
    "a dtype with a byte order that is none": dtype("i8", order="x"),
    "a dtype of records": dtype("V16"),
    "a dtype of any code": dtype("i8,O"),
    "a dtype of times": dtype("M8"),
    "a dtype of what is no text": call("numpy", "dtype", EXPONENTIAL[0], FALSE, TRUE),
    "too many arguments of a dtype": call("numpy", "dtype", text("i8"), *[NONE] * 9),
    "more bytes than the array": array("i8", (1,), raw(b"A" * 9)),
    "fewer bytes than the array": array("i8", (2,), raw(b"A" * 8)),
    "fewer bytes than the buffer's array": from_buffer("i8", (2,), raw(b"A" * 8)),
    "more bytes than the scalar": call("numpy.core.multiarray", "scalar", dtype("i8"), raw(b"A" * 16)),
    "a list for bytes": array("i8", (1,), items(NONE)),
    "a shape too large for memory": array("O", (2**28,), items(NONE)),
    "a shape too large for 64 bits": array("f4", (2**62, 4), raw(b"")),
    "a shape too large for 64 bits, of nothing": array("f4", (0, 2**62), raw(b"")),
    "a shape too large for 64 bits, of nothing and much": array("f4", (0, *[2**39] * 3), raw(b"")),
    "a shape below zero": array("f4", (-1, -1), raw(b"AAAA")),
    "a shape of a list": empty() + many(integer(1), items(integer(1)), dtype("i1"), FALSE, raw(b"A")) + BUILD,
    "a shape of texts": empty() + many(integer(1), many(text("1")), dtype("i1"), FALSE, raw(b"A")) + BUILD,
    "many values of no bytes": array("S0", (2**39,), raw(b"")),
    "many values of no bytes in a buffer": from_buffer("U0", (2**39,), raw(b"")),
    "a boolean of 2": array("b1", (1,), raw(b"\2")),
    "a character that is none": array("U1", (1,), raw(b"\xff" * 4)),
    "a scalar's character that is none": call("numpy.core.multiarray", "scalar", dtype("U1"), raw(b"\xff" * 4)),
    "an array filled twice": array("i8", (1,), raw(b"A" * 8))
    + many(integer(1), shape(1), dtype("i8"), FALSE, raw(b"A" * 8))
    + BUILD,
    "the defaults of a function": name("_codecs", "encode") + many(NONE, b"}" + text("__defaults__") + many(NONE) + b"s") + BUILD,
    "the attributes of a function": name("_codecs", "encode") + b"}" + text("a") + NONE + b"s" + BUILD,
    "the state of a list": LIST + many(NONE) + BUILD,
    "the state of a set": b"\x8f" + many(NONE) + BUILD,
    "an encoding": call("_codecs", "encode", text("YQ=="), text("base64")),
    "zeros": call("builtins", "bytes", integer(2**20)),
    "a text without quotes": b"S" + b"a" * 10**5 + b"\n",
    "a set of an array": call("builtins", "set", array("O", (1,), items(NONE))),
    "an array of another class": call("numpy.core.multiarray", "_reconstruct", name("builtins", "set"), shape(0), raw(b"b")),
    "a call of what is no name": text("eval") + many(text("1")) + REDUCE,
    "a call of ndarray": call("numpy", "ndarray"),
    "arguments that are a list": name("builtins", "set") + items(items(NONE)) + REDUCE,
    "eval": call("builtins", "eval", text("1")),
    "eval of Python 2": call("__builtin__", "eval", text("1")),
    "a name from the stack": text("os") + text("system") + b"\x93",
    "a name of lists": EXPONENTIAL[0] + EXPONENTIAL[0] + b"\x93",
    "a name with dots": text("numpy") + text("dtype.__init__") + b"\x93",
    "INST": b"(ios\nsystem\n",
    "OBJ": b"(" + name("builtins", "set") + b"o",
    "NEWOBJ": name("builtins", "set") + b")\x81",
    "NEWOBJ_EX": name("builtins", "set") + b")}\x92",
    "EXT1": b"\x82\1",
    "EXT2": b"\x83\1\0",
    "EXT4": b"\x84\1\0\0\0",
    "PERSID": b"P1\n",
    "BINPERSID": NONE + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": NONE + b"\x98",
    "a list as a key": b"}" + LIST + NONE + b"s",
    "lists without end as a key": b"}" + EXPONENTIAL[0] + NONE + b"s",
    "tuples without end as a key": b"}" + EXPONENTIAL[1] + NONE + b"s",
    "tuples without end in a dict": b"(" + EXPONENTIAL[1] + NONE + b"d",
    "tuples without end in a set": b"\x8f(" + EXPONENTIAL[1] + b"\x90",
    "tuples without end in a frozen set": b"(" + EXPONENTIAL[1] + b"\x91",
    "tuples without end in a set of before": call("builtins", "set", items(EXPONENTIAL[1])),
    "a deep tuple as a key": b"})" + b"\x85" * 100_000 + NONE + b"s",
    "numbers made to collide": b"}" + integer((2**61 - 1) * 2**8) + NONE + b"s",
    "a name as a key": b"}" + name("builtins", "set") + NONE + b"s",
    "a key without a value": b"}(" + NONE + b"u",
    "an entry of a tuple": b")" + NONE + b"a",
    "an item of a list": LIST + NONE + NONE + b"s",
    "an entry of bytes": b"\x96" + bytes(8) + integer(1) + b"a",
    "an item of a set": b"\x8f" + NONE + NONE + b"s",
    "a member of a dict": b"}(" + NONE + b"\x90",
    "an entry of nothing": NONE + b"a",
    "two of one entry": NONE + b"\x86",
    "a memo of nothing": b"h\7",
    "an end without a mark": b"t",
    "nothing": b"",
    "nothing in a memo": b"q\1",
    "a byte that is no opcode": b"\xff",
}


@pytest.mark.parametrize("attack", REFUSED)
def test_what_is_not_harmless_is_refused(tmp_path, attack):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"d\.pkl: refused or damaged, nothing in it was run") as caught:
        load_plain(write(tmp_path / "d.pkl", REFUSED[attack]))
    assert len(str(caught.value)) < 600 and time.monotonic() - began < 5
    if attack.isupper():
        assert f"got opcode {attack}" in str(caught.value)


@pytest.mark.parametrize(
    "harmless, expected",
    [
        (array("i8", (1,), raw(b"\1" + bytes(7))), [1]),
        (from_buffer("i1", (2,), raw(b"\1\2")), [1, 2]),
        (array("O", (2,), items(integer(1), NONE)), [1, None]),
        (array("S1", (1,), text("\xff")), [b"\xff"]),
        (call("numpy.core.multiarray", "scalar", dtype("b1", "|"), raw(b"\1")), True),
        (call("builtins", "bytes"), b""),
    ],
)
def test_the_same_without_the_attack_is_read(tmp_path, harmless, expected):
    assert np.all(load_plain(write(tmp_path / "d.pkl", harmless)) == expected)


def test_a_refusal_is_one_short_line(tmp_path):
    with pytest.raises(ValueError, match=r"sets and NumPy arrays, got os\\n\.system$"):
        load_plain(write(tmp_path / "d.pkl", text("os\n") + text("system") + b"\x93"))
    with pytest.raises(ValueError, match="got aaa") as caught:
        load_plain(write(tmp_path / "d.pkl", text("a" * 10**6) + text("b") + b"\x93"))
    assert len(str(caught.value)) < 600


REPEATED = {
    "bytes of a text": (name("_codecs", "encode"), many(text("a" * 10**5))),
    "a set": (name("builtins", "set"), many(items(*[integer(i) for i in range(1000)]))),
    "an array": (name("numpy.core.numeric", "_frombuffer"), many(raw(b"a" * 10**5), dtype("i1"), shape(10**5), text("C"))),
}


@pytest.mark.parametrize("attack", ["index of the memo", "index of the memo, as text", *REPEATED])
def test_a_small_pickle_takes_little_memory(tmp_path, attack):
    content = {"index of the memo": NONE + b"r\xff\xff\xff\x7f", "index of the memo, as text": NONE + b"p99999999999\n"}.get(
        attack
    )
    if content is None:
        function, arguments = REPEATED[attack]
        content = function + b"q\0" + arguments + b"q\1" + b"h\0h\1R" * 5000
    write(tmp_path / "d.pkl", content)
    tracemalloc.start()
    try:
        if attack in REPEATED:
            with pytest.raises(ValueError, match="got the same again and again"):
                load_plain(tmp_path / "d.pkl")
        else:
            assert load_plain(tmp_path / "d.pkl") is None
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("start, more", [(LIST, b"q\0](h\0e"), (b")", b"\x85"), (b"}", b"q\0}" + NONE + b"h\0s"), (LIST, b"(l")])
def test_depth_and_number_do_no_harm(tmp_path, start, more):
    found = load_plain(write(tmp_path / "d.pkl", start + more * 100_000))
    assert isinstance(found, list | tuple | dict)
    del found  # which frees it


def test_structures_without_end_are_read_in_no_time(tmp_path):
    for content in EXPONENTIAL:
        assert len(load_plain(write(tmp_path / "d.pkl", content))) == 2
    found = load_plain(write(tmp_path / "d.pkl", LIST + b"q\0h\0a"))
    assert found[0] is found


def test_arrays_share_no_memory_with_the_bytes_they_are_made_of(tmp_path):
    content = raw(b"a" * 5000) + b"q\0"
    state = many(integer(1), shape(5000), dtype("u1"), FALSE, b"h\0") + BUILD
    first, second = empty() + state, call("numpy.core.numeric", "_frombuffer", b"h\0", dtype("u1"), shape(5000), text("C"))
    kept, *arrays = load_plain(write(tmp_path / "d.pkl", b"(" + content + first + first + second + b"t"))
    arrays[0][:] = arrays[2][:1] = 0
    assert set(kept) == {97} and set(arrays[1]) == {97} and set(arrays[2][1:]) == {97}


CONTENT = [
    {"a": [1, 2.5, None, True, False, 2**70, -3, 1000, 70000], b"b": (), 3: {"c": {}}, None: 1, np.int64(4): 2},
    *({"x", "y"}, frozenset({"z"}), set(), frozenset()),
    *("é", "€\n'\\", "x" * 300, b"", b"\xff\n'\"", b"y" * 300, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    *(np.arange(3), np.arange(3, dtype=">i4"), np.arange(2000, dtype=">f8"), np.array([True, False]), np.float16([1.5])),
    *(np.arange(6.0).reshape(2, 3).T, np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), np.arange(9)[::2]),
    *(np.zeros((0, 3)), np.zeros((3, 0), "f4"), np.array(5.0), np.array("é"), np.array([], "U"), np.array([["é", "bcd"]])),
    *(np.array([b"ab", b"c\xff"]), np.array([b"ab", "c", 1, None, 2.5], dtype=object), np.array(["é"], dtype=">U1")),
    *(np.float32(2), np.int8(-1), np.uint64(2**64 - 1), np.bool_(True), np.str_("é"), np.str_(""), np.bytes_(b"q\xff")),
]


def check_same(a, b):
    assert type(a) is type(b)
    if isinstance(b, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape and a.strides == b.strides and a.flags.writeable
        np.testing.assert_array_equal(a, b)
    elif isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            check_same(x, y)
    elif isinstance(b, dict):
        check_same([*a.items()], [*b.items()])
    else:
        assert a == b and getattr(a, "dtype", None) == getattr(b, "dtype", None)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_numpy_writes_is_read_as_python_reads_it(tmp_path, protocol):
    (tmp_path / "d.pkl").write_bytes(pickle.dumps(CONTENT, protocol))
    check_same(load_plain(tmp_path / "d.pkl"), pickle.loads((tmp_path / "d.pkl").read_bytes()))


def test_what_numpy_1_writes_is_read(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        content = pickle.dumps(np.arange(6.0).reshape(2, 3).T, protocol)
        old = content.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
        old = old.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray").replace(b"numpy._core", b"numpy.core")
        (tmp_path / "d.pkl").write_bytes(old)
        assert load_plain(tmp_path / "d.pkl").tolist() == [[0, 3], [1, 4], [2, 5]]


# [{"a": 1}, set(["b"]), "c\xff\n", u"\xe9", np.array([1, 200], ">i2"), np.float32(2), 2**70, True], by NumPy 1.16
PYTHON_2_0 = (
    b"(lp1\n(dp2\nS'a'\nI1\nsac__builtin__\nset\np3\n((lp4\nS'b'\natRp5\naS'c\\xff\\n'\np6\naV\xe9\nacnumpy.core.multi"
    b"array\n_reconstruct\np7\n(cnumpy\nndarray\np8\n(I0\ntS'b'\ntRp9\n(I1\n(I2\ntcnumpy\ndtype\np10\n(S'i2'\nI0\nI1\n"
    b"tRp11\n(I3\nS'>'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x01\\x00\\xc8'\ntbacnumpy.core.multiarray\nscalar\np12\n(g10"
    b"\n(S'f4'\nI0\nI1\ntRp13\n(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbS'\\x00\\x00\\x00@'\ntRp14\naL1180591620717411303424L\naI"
    b"01\na."
)
PYTHON_2_2 = (
    b"\x80\x02]q\x01(}q\x02U\x01aK\x01sc__builtin__\nset\nq\x03]q\x04U\x01ba\x85Rq\x05U\x03c\xff\nq\x06X\x02\x00\x00"
    b"\x00\xc3\xa9cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01K\x02"
    b"\x85cnumpy\ndtype\nq\nU\x02i2K\x00K\x01\x87Rq\x0b(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
    b"\x04\x00\x01\x00\xc8tbcnumpy.core.multiarray\nscalar\nq\x0ch\nU\x02f4K\x00K\x01\x87Rq\r(K\x03U\x01<NNNJ\xff\xff"
    b"\xff\xffJ\xff\xff\xff\xffK\x00tbU\x04\x00\x00\x00@\x86Rq\x0e\x8a\t\x00\x00\x00\x00\x00\x00\x00\x00@\x88e."
)


@pytest.mark.parametrize("content", [PYTHON_2_0, PYTHON_2_2])
def test_what_python_2_writes_is_read(tmp_path, content):
    (tmp_path / "d.pkl").write_bytes(content)
    found = load_plain(tmp_path / "d.pkl")
    check_same(found, [{"a": 1}, {"b"}, "c\xff\n", "é", np.array([1, 200], "i2"), np.float32(2), 2**70, True])


def test_a_pickle_cut_short_anywhere_is_refused(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        whole = pickle.dumps([{"a": np.arange(9)}, {1, 2}, np.float32(1), "x" * 30], protocol)
        for size in range(len(whole)):
            with pytest.raises(ValueError):
                Machine(whole[:size]).run()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of damaged escapes
def test_a_damaged_pickle_is_read_or_refused(tmp_path):
    generator = random.Random(0)
    wholes = [pickle.dumps(CONTENT[i : i + 7], protocol) for i in range(0, len(CONTENT), 7) for protocol in range(6)]
    wholes += [attack for attack in REFUSED.values() if len(attack) < 1000]
    for _ in range(600):
        damaged = bytearray(generator.choice(wholes))
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(damaged) + 1)
            other = generator.choice(wholes)
            cut = generator.randrange(len(other) + 1)
            change = generator.choice([bytes([generator.randrange(256)]), b"", other[cut : cut + generator.randrange(40)]])
            damaged[at : at + generator.randrange(3)] = change
        (tmp_path / "d.pkl").write_bytes(damaged + b".")
        try:
            load_plain(tmp_path / "d.pkl")
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'd.pkl'}: refused or damaged") and len(str(error)) < 600


def test_opcodes_that_push_what_is_read_are_as_python_has_them():
    types = {"int", "int_or_bool", "float", "str", "bytes", "bytes_or_str", "bytearray"}
    pushed = {op.name for op in pickletools.opcodes if op.arg and [x.name for x in op.stack_after] in [[t] for t in types]}
    assert pushed == LITERALS


def header(shape, descr="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npz(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(9))
    return (tmp_path / "a.npz").read_bytes()


NOT_NAMES = {
    "empty": (lambda _: b"", "expected an array in NumPy's format"),
    "zip": (npz, "expected an array in NumPy's format"),
    "damaged zip": (lambda path: npz(path)[:50], "expected an array in NumPy's format"),
    "pickle": (lambda _: pickle.dumps([1]), "expected an array in NumPy's format"),
    "giant": (lambda _: header((2**50,)), "expected an array in NumPy's format: .* got 0"),
    "giant product": (lambda _: header((2**40, 2**40)), "expected an array in NumPy's format: .* got 0"),
    "giant, of nothing": (lambda _: header((2**40,), "<U0"), "expected an array in NumPy's format"),
    "below zero": (lambda _: header((-4,)) + bytes(16), "expected an array in NumPy's format"),
    "long header": (lambda _: header((1,) * 30, "<f4" + " " * 20000), "expected an array in NumPy's format: Header"),
    "damaged header": (lambda _: header((2,)).replace(b"descr", b"[[[[["), "expected an array in NumPy's format"),
    "cut short": (lambda _: header((5,)) + bytes(19), "expected an array in NumPy's format: 20 bytes of float32 .5., got 19"),
    "single": (lambda _: header((), "<U1") + b"a\0\0\0", r"expected names \[N\] or \[N, 1\], got <U1 \[\]"),
    "two columns": (lambda _: header((1, 2), "<U1") + b"a\0\0\0" * 2, r"expected names .*, got <U1 \[1, 2\]"),
    "no characters": (lambda _: header((1,), "<U1") + b"\xff" * 4, "expected names, got others"),
    "list": (lambda _: header((1,), "|O") + pickle.dumps(["a"]), "expected an array of numbers or strings"),
    "lists without end": (lambda _: header((1,), "|O") + EXPONENTIAL[0] + b".", "expected an array of numbers or strings"),
    "single object": (lambda _: header((), "|O") + pickle.dumps(np.array(None)), r"expected names .*, got object \[\]"),
    "objects": (lambda _: header((1,), "|O") + array("O", (1,), items(LIST)) + b".", "refused or damaged"),
}


@pytest.mark.parametrize("kind", NOT_NAMES)
def test_what_is_no_array_of_names_is_named(tmp_path, kind):
    make, message = NOT_NAMES[kind]
    (tmp_path / "names.npy").write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match=rf"names\.npy: {message}") as caught:
        load_names(tmp_path / "names.npy")
    assert "allow_pickle" not in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_no_characters_are_not_made_of_their_number_alone(tmp_path):
    with pytest.raises(ValueError, match="names.npy: expected names .*, got <U0"):
        entries(tmp_path / "names.npy", np.ndarray(2**40, "U0"))


def test_names_are_read(tmp_path):
    for names in (["a", "bc"], [b"a", b"bc"], [1, 2]):
        for dtype in (None, object):
            for shape in (2, (2, 1)):
                np.save(tmp_path / "names.npy", np.array(names, dtype).reshape(shape))
                assert load_names(tmp_path / "names.npy") == names


def test_arrays_are_read_from_pickles_by_the_same_machine(tmp_path):
    for content, message in (
        ([1], "got list"),
        (np.array(["a"]), "got <U1"),
        (np.array([None]), "got object"),
        (eval, "got .*eval"),
    ):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DecodeError, match=rf"a\.pkl: not an array \(.*expected a NumPy array.*{message}"):
            load_array(tmp_path / "a.pkl")
    (tmp_path / "a.npy").write_bytes(header((2**50,)))
    with pytest.raises(DecodeError, match=r"a\.npy: not an array \(expected an array in NumPy's format: .* got 0"):
        load_array(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([1, None]))
    with pytest.raises(ValueError, match=r"a\.npy: expected an array of numbers or strings, got Python objects"):
        load_npy(tmp_path / "a.npy")
