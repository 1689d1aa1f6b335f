"""The routes: what they answer, and what they refuse with which status."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dlfer.serve.guard import Policy
from dlfer.serve.limits import Limits


def post_file(client, contents, path="/v1/predict", name="a.png", headers=None, **fields):
    return client.post(path, files={"file": (name, contents)}, data=fields, headers=headers)


def test_two_faces_are_found_boxed_and_predicted(serve, two_faces):
    answer = post_file(serve(), two_faces)
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == "one"
    assert "annotators" in body["notice"]
    (picture,) = body["images"]
    assert (picture["name"], picture["width"], picture["height"], picture["num_faces_found"]) == ("a.png", 80, 40, 2)
    assert [face["label"] for face in picture["faces"]] == ["dark", "bright"]
    assert [face["box"] for face in picture["faces"]] == [[0, 0, 40, 40], [40, 0, 80, 40]]
    for face in picture["faces"]:
        assert sum(face["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert face["confidence"] == max(face["probabilities"].values())


def test_a_picture_without_a_face_has_none_and_whole_makes_it_one(serve, png):
    client, contents = serve(), png(np.full((50, 60, 3), 127, np.uint8))
    assert post_file(client, contents).json()["images"][0]["faces"] == []
    (face,) = post_file(client, contents, faces="whole").json()["images"][0]["faces"]
    assert (face["label"], face["box"]) == ("grey", None)


def test_json_and_several_files_say_the_same(serve, two_faces, png, as_base64):
    client, dark = serve(), png(np.full((20, 40, 3), 10, np.uint8))
    asked = {"images": [{"base64": as_base64(two_faces), "name": "x"}, {"base64": as_base64(dark)}], "model": "two"}
    by_json = client.post("/v1/predict", json=asked).json()
    by_form = client.post(
        "/v1/predict", files=[("file", ("x", two_faces)), ("file", ("image 2", dark))], data={"model": "two"}
    ).json()
    assert by_json == by_form
    assert [len(picture["faces"]) for picture in by_json["images"]] == [2, 2]


@pytest.mark.parametrize("text", ["@0", "@1", "@00", "@:0"])
def test_no_text_of_a_client_stands_for_another_picture(client, png, as_base64, text):
    """Long pictures leave a placeholder in the JSON that is parsed."""
    noise = png(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))
    asked = {"images": [{"base64": as_base64(noise)}, {"base64": text, "name": "second"}], "faces": "whole"}
    answer = client.post("/v1/predict", json=asked)
    assert (answer.status_code, "second: not valid base64" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    "content",
    [
        b'{"images": [{"base64": "AAAA"}], "faces": "auto", "faces": "whole"}',
        b'{"images": [{"base64": "AAAA", "base64": "BBBB"}]}',
        b'{"images": [{"base64": "AAAA", "b\\u0061se64": "BBBB"}]}',
    ],
)
def test_a_key_twice_is_refused(client, content):
    answer = client.post("/v1/predict", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, "occurs twice" in answer.json()["error"]) == (400, True)


def test_no_text_of_a_client_stands_for_a_tensor(client):
    tensor = {"name": "images", "shape": [1, 8, 8], "datatype": "UINT8", "data": ["@0"]}
    answer = client.post("/v2/models/one/infer", json={"parameters": {"data": [7] * 64}, "inputs": [tensor]})
    assert (answer.status_code, "expected 64 integers" in answer.json()["error"]) == (400, True)


def test_more_faces_than_the_limit_are_told_and_not_predicted(serve, engine, two_faces):
    (picture,) = post_file(serve(Limits(faces=1)), two_faces).json()["images"]
    assert picture["num_faces_found"] == 2
    assert len(picture["faces"]) == 1
    assert engine.sizes == [1]


def test_bad_pictures_are_refused_by_what_they_are(serve, two_faces, huge_png):
    client = serve()
    text = post_file(client, b"just words\n", name="photo.jpg")
    assert (text.status_code, "photo.jpg" in text.json()["error"]) == (415, True)
    huge = post_file(client, huge_png)
    assert (huge.status_code, "pixels" in huge.json()["error"]) == (413, True)
    cut = post_file(client, two_faces[:-30])
    assert cut.status_code == 400
    # Together they may hold no more than one may.
    small = serve(Limits(pixels=5000))
    two = client_post_two(small, two_faces)
    assert (post_file(small, two_faces).status_code, two.status_code) == (200, 413)


def test_heic_is_read_with_its_package(serve):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), (230, 230, 230)).save(stream, "HEIF")
    answer = post_file(serve(), stream.getvalue(), name="a.heic", faces="whole")
    assert answer.status_code == 200, answer.text
    assert [face["label"] for face in answer.json()["images"][0]["faces"]] == ["bright"]
    assert post_file(serve(Limits(pixels=4000)), stream.getvalue()).status_code == 413


def client_post_two(client, contents):
    return client.post("/v1/predict", files=[("file", ("a", contents)), ("file", ("b", contents))])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"json": {"images": []}}, 400),
        ({"json": {"images": [{"base64": "%%%"}]}}, 400),
        ({"json": {"images": [{"base64": "AAAA"}], "imges": 1}}, 400),
        ({"json": {"images": [{"base64": "AAAA"}]}}, 415),
        ({"json": {"images": [{"base64": "AAAA"}], "model": "none"}}, 404),
        ({"json": {"images": [{"base64": "AAAA"}] * 17}}, 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400),
        ({"files": {"other": b"x"}}, 400),
        ({"files": {"file": b"x"}, "data": {"fces": "whole"}}, 400),
        ({"files": {"file": b"x"}, "data": {"faces": "half"}}, 400),
        ({"files": {"file": b"x"}, "data": {"crops": "yes"}}, 400),
        ({"files": [("file", b"x")] * 17}, 400),
        ({}, 415),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, sent, status):
    answer = client.post("/v1/predict", **sent)
    assert answer.status_code == status
    assert len(answer.json()["error"]) > 10


def test_faces_are_returned_as_the_model_is_given_them_if_that_is_asked_for(serve, two_faces, as_base64):
    client = serve()
    by_form = post_file(client, two_faces, crops="true").json()["images"][0]["faces"]
    asked = {"images": [{"base64": as_base64(two_faces)}], "crops": True}
    by_json = client.post("/v1/predict", json=asked).json()["images"][0]["faces"]
    assert by_form == by_json
    for face, level in zip(by_form, (0, 255), strict=True):
        crop = np.asarray(Image.open(io.BytesIO(base64.b64decode(face["crop_png"]))))
        assert crop.ndim == 2
        assert abs(int(crop.mean()) - level) < 64
    plain = post_file(client, two_faces, crops="false").json()["images"][0]["faces"]
    assert [face["crop_png"] for face in plain] == [None, None]


def test_errors_never_repeat_what_was_sent(serve):
    secret = "c2VjcmV0" * 50
    answer = serve().post("/v1/predict", json={"images": [{"base64": "ok", "name": secret}], "faces": secret})
    assert answer.status_code == 400
    assert secret[:40] not in answer.text


def test_unknown_paths_and_methods_answer_in_json_too(serve):
    client = serve()
    assert "error" in client.get("/nothing").json()
    wrong = client.get("/v1/predict")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_the_occlusion_map_is_drawn_and_told_in_words(serve, png):
    client = serve()
    image = np.full((40, 80, 3), 30, np.uint8)
    image[:20, 40:60] = 255  # of the second face the upper left is bright
    answer = post_file(client, png(image), "/v1/explain", face="1", label="grey")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model"], body["label"], body["predicted"]) == ("one", "grey", "grey") or body["predicted"] == "dark"
    assert "upper left" in body["description"]
    assert body["largest_fall"] > 0.01
    for key in ("crop_png", "map_png"):
        assert Image.open(io.BytesIO(base64.b64decode(body[key]))).size == (384, 384)


def test_what_cannot_be_explained_is_refused(serve, two_faces, as_base64):
    client = serve()
    assert post_file(client, two_faces, "/v1/explain", face="2").status_code == 400
    assert post_file(client, two_faces, "/v1/explain", face="-1").status_code == 400
    assert post_file(client, two_faces, "/v1/explain", label="joy").status_code == 400
    assert post_file(client, b"words", "/v1/explain").status_code == 415
    by_json = client.post("/v1/explain", json={"image": {"base64": as_base64(two_faces)}, "face": 1})
    assert by_json.json()["predicted"] == "bright"


def test_the_models_tell_what_they_are(serve):
    body = serve().get("/v1/models").json()
    assert [card["name"] for card in body["models"]] == ["one", "two"]
    assert body["models"][0]["optimizer"] == "adam"


def test_tensors_of_kserve(serve, engine):
    client = serve()
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    described = client.get("/v2/models/one").json()
    assert described["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 1]}]
    assert client.get("/v2/models/none").status_code == 404
    images = np.stack([np.full((16, 16), 20), np.full((16, 16), 220)]).astype(int)
    tensor = {"name": "images", "shape": [2, 16, 16], "datatype": "UINT8", "data": images.ravel().tolist()}
    flat = client.post("/v2/models/one/infer", json={"id": "7", "inputs": [tensor]}).json()
    nested = client.post(
        "/v2/models/one/infer", json={"id": "7", "inputs": [{**tensor, "data": images.tolist()}]}
    ).json()
    assert flat == nested
    assert (flat["model_name"], flat["id"]) == ("one", "7")
    probabilities, labels = flat["outputs"]
    assert (probabilities["name"], probabilities["shape"], probabilities["datatype"]) == (
        "probabilities",
        [2, 3],
        "FP32",
    )
    np.testing.assert_allclose(
        np.reshape(probabilities["data"], (2, 3)), engine.predict(images[..., None].astype(np.uint8)), rtol=1e-6
    )
    assert labels["data"] == ["dark", "bright"]
    only = client.post("/v2/models/one/infer", json={"inputs": [tensor], "outputs": [{"name": "labels"}]}).json()
    assert [output["name"] for output in only["outputs"]] == ["labels"]
    assert "id" not in only


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"shape": [2, 8, 9]}, 400),
        ({"shape": [1, 8, 8, 2]}, 400),
        ({"shape": [1, 7, 8], "data": [0] * 56}, 400),
        ({"shape": [1, 2, 2, 3], "data": [0] * 12}, 400),
        ({"data": [256] * 64}, 400),
        ({"data": [-1] * 64}, 400),
        ({"data": [0.5] * 64}, 400),
        ({"data": [True] * 64}, 400),
        ({"data": ["a"] * 64}, 400),
        ({"data": [[1, 2], [3]]}, 400),
        ({"data": [10**30] * 64}, 400),
        ({"data": [[1] * 32, [1] * 32]}, 400),
        ({"datatype": "FP32"}, 400),
        ({"name": "picture"}, 400),
        ({"shape": [300, 1, 1], "data": [0] * 300}, 413),
        ({"shape": [1, 100000, 100000]}, 413),
    ],
)
def test_a_wrong_tensor_is_refused(client, change, status):
    tensor = {"name": "images", "shape": [1, 8, 8], "datatype": "UINT8", "data": [0] * 64} | change
    answer = client.post("/v2/models/one/infer", json={"inputs": [tensor]})
    assert answer.status_code == status, answer.text


def test_whatever_the_size_the_network_is_given_one(serve, engine, two_faces, png):
    """Keras keeps a program for each size; strangers must not be able to fill the memory with them."""
    client = serve()
    post_file(client, two_faces)
    for side in (9, 33, 70):
        post_file(client, png(np.full((side, side + 5, 3), 9, np.uint8)), faces="whole")
        tensor = {"name": "images", "shape": [1, side, 8, 3], "datatype": "UINT8", "data": [7] * (side * 24)}
        assert client.post("/v2/models/one/infer", json={"inputs": [tensor]}).status_code == 200
    assert engine.shapes == {(16, 16, 1)}


def test_the_page_is_whole_and_its_policy_is_strict(serve):
    client = serve()
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for name in ("page.css", "page.js"):
        assert f'"{name}"' in page.text
        assert client.get(f"/{name}").status_code == 200
    together = page.text + client.get("/page.css").text + client.get("/page.js").text
    assert "http://" not in together
    assert "https://" not in together
    assert "innerHTML" not in together
    assert "onclick" not in page.text
    assert "<style" not in page.text
    assert "Art. 5(1)(f)" in page.text
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"


def test_openapi_names_the_routes_and_the_bodies(serve):
    schema = serve().get("/openapi.json").json()
    assert {"/v1/predict", "/v1/explain", "/v2/models/{name}/infer", "/healthz", "/readyz", "/metrics"} <= set(
        schema["paths"]
    )
    assert set(schema["paths"]["/v1/predict"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
    assert {"413", "503", "504"} <= set(schema["paths"]["/v1/predict"]["post"]["responses"])
    assert "$defs" not in str(schema)


def test_requests_are_counted_without_the_paths_of_strangers(serve, two_faces):
    client = serve()
    post_file(client, two_faces)
    post_file(client, b"words")
    client.get("/some/secret")
    text = client.get("/metrics").text
    assert 'dlfer_requests_total{route="/v1/predict",status="200"} 1.0' in text
    assert 'dlfer_requests_total{route="/v1/predict",status="415"} 1.0' in text
    assert 'dlfer_faces_total{model="one"} 2.0' in text
    assert "dlfer_request_seconds_bucket" in text
    assert "secret" not in text


@pytest.mark.parametrize("prefix", ["", "/faces"])
def test_the_description_of_the_api_is_no_unknown_path(serve, prefix):
    client = serve(policy=Policy(root_path=prefix))
    assert client.get(f"{prefix}/openapi.json").status_code == 200
    assert client.post("/openapi.json").status_code == 405
    client.get("/docs")
    text = client.get("/metrics").text
    for counted in (
        'route="/openapi.json",status="200"} 1.0',
        'route="/openapi.json",status="405"} 1.0',
        'route="unknown",status="404"} 1.0',
    ):
        assert f"dlfer_requests_total{{{counted}" in text
