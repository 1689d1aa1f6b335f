"""What a worker does with untrusted input: JSON, tensors, forms, base64, and the headers of pictures."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from dlfer.predict.media import read_image
from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.worker import (
    decode_base64,
    decode_picture,
    extract_large_parts,
    measure_pictures,
    read_tensor,
    split_form,
)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": [1, 2.5, -3e4, true, null, "x\\"y", "\xc3\xa4"], "b": {"c": []}}',
        b'"data"',
        b'["data", [1, 2]]',
        b'{"data": [1, 0.5]}',
        b'{"data": "[1]"}',
        b'{"x\\"data": [1]}',
        b" [ ] \r\n",
    ],
)
def test_what_is_small_stays(body):
    rest, spans = extract_large_parts(body)
    assert (json.loads(rest), spans) == (json.loads(body), [])


@pytest.mark.parametrize("body", [b'{"face": 1 2}', b'{"crops": tr ue}', b"[1 true]"])
def test_literals_beside_each_other_do_not_become_one(body):
    rest, _ = extract_large_parts(body)
    with pytest.raises(json.JSONDecodeError):
        json.loads(rest)


def test_arrays_and_long_texts_are_set_apart():
    body = b'{"inputs": [{"data" : [[1, 2],\n[3,4]] , "base64": "' + b"a\\n" * 1000 + b'"}], "data": [7]}'
    rest, spans = extract_large_parts(body)
    assert json.loads(rest) == {"inputs": [{"data": ["@0"], "base64": "@1"}], "data": ["@2"]}
    assert [body[slice(*span)] for span in spans] == [b"[[1, 2],\n[3,4]]", b"a\\n" * 1000, b"[7]"]


@pytest.mark.parametrize("before", [b'{"id": ', b'{"data": [1], "id": ', b'{"base64": {"x": [', b"", b"["])
def test_long_texts_that_are_no_picture_are_refused(before):
    with pytest.raises(
        Refusal, match="has 3,000 bytes; expected at most 2,046, except under base64 and data"
    ) as refused:
        extract_large_parts(before + b'"' + b"a" * 3000 + b'"')
    assert refused.value.status == 400


@pytest.mark.parametrize("text", [b"[1,2,3,4]", b"[[1,2],[3,4]]", b" [ [ 1 ,2 ]\n,[3,4 ] ] "])
def test_tensors_are_flat_or_nested(text):
    assert read_tensor(text, [2, 2]).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    "text",
    [
        b"[1,2,3]", b"[1,2,3,4,5]", b"[[1,2,3,4]]", b"[[1],[2],[3],[4]]", b"[[1,2],[3]]", b"[1,2,3,256]", b"[1,2,3,1000]",
        b"[1,2,3 4]", b"[1,2,,4]", b"[,1,2,3]", b"[01,2,3,4]", b"[[1,2][3,4]]", b"]1,2,3,4[", b"", b"[]", b"[1,2,3,65537]",
    ],
)  # fmt: skip
def test_other_tensors_are_refused(text):
    with pytest.raises(Refusal) as refused:
        read_tensor(text, [2, 2])
    assert refused.value.status == 400


@pytest.mark.parametrize("tail", [b"", b"\xff\xfe\xfb", b"ab"])
def test_base64_is_taken_as_clients_send_it(tail):
    contents = bytes(range(256)) + tail
    plain = base64.b64encode(contents)
    lines = b"\\r\\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    for text in (
        plain,
        plain.rstrip(b"="),
        lines,
        base64.encodebytes(contents),
        base64.urlsafe_b64encode(contents).rstrip(b"="),
        b"  \n" + plain + b" ",
        b"data:image/png;base64," + plain,
        b" DATA:;base64," + plain,
        b"data:image/png;base64," + plain.replace(b"+", b"%2B").replace(b"/", b"%2f").replace(b"=", b"%3D"),
        b"data:,\f\v" + plain + b"====",
        plain.replace(b"/", b"\\/"),
    ):
        assert decode_base64(text, "x") == contents


@pytest.mark.parametrize("text", [b"%%%", b"a", b"AA=A", "ä".encode(), b"\\x", b"AAAA\\u00e4"])
def test_what_is_not_base64_is_refused(text):
    with pytest.raises(Refusal, match="not valid base64"):
        decode_base64(text, "x")


def make_part(head: bytes, contents: bytes) -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + contents + b"\r\n"


def test_forms_are_split_where_they_stand():
    file = b"\r\n--\r\n-b\x00 --b"
    body = (
        make_part(b'content-disposition: form-data; name="model"', b"one")
        + make_part(
            b'Content-Type: image/png\r\nContent-Disposition: form-data; name="file"; filename="\xc3\xa4.png"', file
        )
        + make_part(b'Content-Disposition: form-data; name=file; filename=""', b"")
        + b"--b--\r\n"
    )
    texts, files = split_form(body, 'multipart/form-data; boundary="b"', files=4)
    assert texts == [("model", "one")]
    assert [(name, file_name, body[slice(*span)]) for name, file_name, span in files] == [
        ("file", "ä.png", file),
        ("file", "", b""),
    ]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "1"])
def test_rows_are_those_of_the_whole_picture(mode, monkeypatch):
    monkeypatch.setattr("dlfer.serve.worker._STRIP_BYTES", 500)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    size, rows = decode_picture("x", stream.getvalue(), Limits())
    parts = list(rows)
    assert (tuple(size), len(parts) > 3) == ((30, 40), True)
    np.testing.assert_array_equal(np.concatenate(parts), read_image(stream.getvalue()))


def test_memory_is_known_before_anything_is_decoded():
    stream = io.BytesIO()
    Image.new("RGB", (1000, 500)).save(stream, "JPEG", progressive=True)
    file = ("x", stream.getvalue())
    assert measure_pictures([file, file], Limits()) == (1_000_000, 500_000 * (3 + 3 + 9))
    with pytest.raises(Refusal, match="250,000") as refused:
        measure_pictures([file], Limits(decode_bytes=3_000_000))
    assert refused.value.status == 413


def test_pictures_that_fit_alone_and_not_together_are_refused_instead_of_waited_for():
    stream = io.BytesIO()
    Image.new("RGB", (1000, 500)).save(stream, "WEBP", method=0)
    limits = Limits(pixels=1_000_000, decode_bytes=8_000_000)  # as of --max-pixels 1000000
    assert measure_pictures([("a", stream.getvalue())], limits) == (500_000, 500_000 * 16)
    with pytest.raises(Refusal, match=r"the 2 files takes 9,500,000 bytes of memory, and a request may take 8,000,000"):
        measure_pictures([("a", stream.getvalue()), ("b", stream.getvalue())], limits)


def test_heic_without_its_package_is_refused_with_the_name_of_the_package(monkeypatch):
    monkeypatch.setattr("dlfer.serve.worker.can_read_heif", lambda: False)
    contents = b"\0\0\0\x18ftypheic" + bytes(100)
    with pytest.raises(Refusal, match=r"a\.heic: a HEIC picture, .*: pip install pillow-heif\.") as refused:
        measure_pictures([("a.heic", contents)], Limits())
    assert refused.value.status == 415


def make_heic(*images: Image.Image, **options) -> bytes:
    pytest.importorskip("pillow_heif").register_heif_opener()
    stream = io.BytesIO()
    images[0].save(stream, "HEIF", save_all=True, append_images=images[1:], **options)
    return stream.getvalue()


def test_heic_has_the_limits_of_other_pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = make_heic(Image.new("RGB", (100, 40), "blue"), exif=exif.tobytes())
    assert measure_pictures([("a", contents)], Limits()) == (4000, 4000 * 16)
    size, rows = decode_picture("a", contents, Limits())
    assert size == (100, 40)
    assert np.concatenate(list(rows)).mean(axis=(0, 1)).round() == pytest.approx([0, 0, 255], abs=3)
    for limits in (Limits(pixels=3999), Limits(decode_bytes=4000 * 16 - 1)):
        with pytest.raises(Refusal, match="40 x 100 = 4,000 pixels") as refused:
            measure_pictures([("a", contents)], limits)
        assert refused.value.status == 413


def test_of_several_images_in_a_heic_the_primary_one_is_measured_and_read():
    contents = make_heic(Image.new("RGB", (200, 200)), Image.new("RGB", (60, 50), "blue"), primary_index=1)
    assert measure_pictures([("a", contents)], Limits())[0] == 3000
    assert decode_picture("a", contents, Limits())[0] == (50, 60)


def test_the_limit_of_pixels_is_the_servers_and_not_pillows():
    contents = b"P6 15000 15000 255\n" + bytes(10)  # 225 million; Pillow alone refuses more than 179 million
    assert measure_pictures([("a", contents)], Limits(pixels=300_000_000, decode_bytes=2_400_000_000))[0] == 225_000_000
    with pytest.raises(Refusal, match=r"a: found 15000 x 15000 = 225,000,000 pixels") as refused:
        measure_pictures([("a", contents)], Limits())
    assert refused.value.status == 413
