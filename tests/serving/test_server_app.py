"""LibreTranslate's API: what its clients send, and what they get."""

import logging
from typing import Any

import pytest
from serving_cases import BAD_WORD, MakeClient, Shouting, error_of
from starlette.testclient import TestClient

from hf_moe_ted import Glossary

PAIR = {"source": "en", "target": "de"}


@pytest.mark.parametrize("kind", ["json", "data", "params", "files"])
def test_every_way_to_send_a_text(client: TestClient, kind: str) -> None:
    fields: dict[str, Any] = {"q": "close it", **PAIR}
    if kind == "files":  # a form of several parts, as a page sends it
        fields = {name: (None, value) for name, value in fields.items()}
    answer = client.post("/translate", **{kind: fields})
    assert answer.status_code == 200
    assert answer.json() == {"translatedText": "CLOSE IT", "problems": []}


def test_list_with_languages_and_alternatives(client: TestClient) -> None:
    texts = ["close all tabs", "", "nichts gespeichert: die Festplatte ist voll"]
    answer = client.post("/translate", json={"q": texts, "source": "auto", "target": "fr", "alternatives": 9}).json()
    assert answer["translatedText"] == [text.upper() for text in texts]
    assert [found["language"] for found in answer["detectedLanguage"]] == ["en", "en", "de"]
    assert [found["confidence"] > 50 for found in answer["detectedLanguage"]] == [True, False, True]
    # as many as there are beams for, and none that is the translation again
    assert answer["alternatives"][0] == ["CLOSE ALL TABS!", "CLOSE ALL TABS!!"]
    assert answer["alternatives"][1] == []


def test_forms_of_language_codes(client: TestClient) -> None:
    for source, target in [("en-US", "de_DE"), ("eng_Latn", "deu"), ("EN", "ger"), ("AUTO", "fr-CA")]:
        fields = {"q": "close all tabs", "source": source, "target": target}
        assert client.post("/translate", json=fields).json()["translatedText"] == "CLOSE ALL TABS"


def test_problems(client: TestClient) -> None:
    answer = client.post("/translate", json={"q": ["a nonsense", "some sense"], **PAIR}).json()
    assert answer["problems"] == [["'a nonsense': is empty of sense"], []]


def test_glossary(client: TestClient, shouting: Shouting) -> None:
    fields = {"q": ["close the tab", "save"], **PAIR, "glossary": {"tab": "REITER", "save": None}}
    assert client.post("/translate", json=fields).status_code == 200
    assert shouting.phrases_seen == ["REITER", "save"] * 2  # both are searched for, as nothing has them
    bad: Any
    for bad in ({" ": "a"}, {"a": 1}, "a\tb", {"tab": ""}, {"tab": " \n"}, {"tab": "x" * 501}, {"x" * 501: None}):
        answer = client.post("/translate", json={**fields, "glossary": bad})
        assert (answer.status_code, "glossary" in error_of(answer)) == (400, True)


def test_glossary_of_the_server(make_client: MakeClient, shouting: Shouting) -> None:
    client = make_client(glossary=Glossary([("tab", "REITER")]))
    client.post("/translate", json={"q": "close the tab", **PAIR})
    client.post("/translate", json={"q": "a tab", **PAIR, "glossary": {"tab": "KARTE"}})
    client.post("/translate_file", files={"file": ("a.txt", "one tab")}, data=PAIR)
    assert shouting.phrases_seen[::2] == ["REITER", "KARTE", "REITER"]  # each is searched for, too


def test_same_language_stays(client: TestClient, shouting: Shouting) -> None:
    answer = client.post("/translate", json={"q": ["schließen", "close all tabs"], "source": "auto", "target": "de"})
    assert answer.json()["translatedText"] == ["schließen", "CLOSE ALL TABS"]
    assert client.post("/translate", json={"q": "a", "source": "fr", "target": "fr"}).json()["translatedText"] == "a"
    assert shouting.texts_seen == ["close all tabs"]


def test_html(client: TestClient) -> None:
    source = '<p class="a">Click <b>Save</b> &amp; <i translate="no">wait</i></p><script>if (a < b) go()</script>'
    answer = client.post("/translate", json={"q": source, **PAIR, "format": "html", "alternatives": 2}).json()
    expected = '<p class="a">CLICK <b>SAVE</b> &amp; <i translate="no">wait</i></p><script>if (a < b) go()</script>'
    assert answer == {"translatedText": expected, "alternatives": [], "problems": []}
    plain = "<p>Open the file.</p>"
    both = client.post("/translate", json={"q": [source, plain], **PAIR, "format": "html", "alternatives": 2}).json()
    assert both["alternatives"] == [[], []] and both["translatedText"][0] == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "en", "target": "de"}, "Invalid request: missing q parameter"),
        ({"q": "", **PAIR}, "Invalid request: missing q parameter"),
        ({"q": [], **PAIR}, "Invalid request: missing q parameter"),
        ({"q": "a", "target": "de"}, "Invalid request: missing source parameter"),
        ({"q": "a", "source": "en"}, "Invalid request: missing target parameter"),
        ({"q": 3, **PAIR}, "Invalid request: q: Input should be a valid string"),
        ({"q": ["a", None], **PAIR}, "Invalid request: q: Input should be a valid string"),
        ({"q": "a", "source": "en", "target": "zz"}, "zz is not supported: unknown language 'zz', the model knows: en"),
        ({"q": "a", "source": "nl", "target": "de"}, "nl is not supported"),
        ({"q": "a", "source": "en", "target": "auto"}, "auto is not supported"),
        ({"q": "a", **PAIR, "format": "pdf"}, "Invalid request: format: Input should be 'text', 'html'"),
        ({"q": "a", **PAIR, "alternatives": -1}, "Invalid request: alternatives: Input should be greater than or eq"),
        ({"q": "a", **PAIR, "alternatives": True}, "Invalid request: alternatives: Input should be a valid integer"),
        (["q"], "Invalid request: Input should be an object"),
    ],
)
def test_bad_fields(client: TestClient, fields: Any, message: str) -> None:
    answer = client.post("/translate", json=fields)
    assert answer.status_code == 400
    assert error_of(answer).startswith(message)


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        ("application/json", b'{"q": "\xff", "source": "en", "target": "de"}', "the text is not UTF-8"),
        ("application/json", b'{"q": "\\ud800", "source": "en", "target": "de"}', "Invalid JSON: unexpected end of"),
        ("application/json", b"[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        ("application/json", b"", "Invalid JSON: EOF while parsing"),
        ("application/x-www-form-urlencoded", b"q=%ff&source=en&target=de", "the text is not UTF-8"),
        ("application/x-www-form-urlencoded", b"q=a&q=b&source=en&target=de", "q came twice"),
        ("application/x-www-form-urlencoded", b"a=1&" * 1_000, "the form has more than 100 fields"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="q"\r\n\r\n\xff',
            "not UTF-8",
        ),
        ("multipart/form-data", b"q", "Missing boundary in multipart"),
        ("text/plain", b"q=a", "missing q parameter"),
    ],
)
def test_bad_bodies(client: TestClient, kind: str, body: bytes, message: str) -> None:
    answer = client.post("/translate", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert message in error_of(answer)
    assert client.get("/health").json() == {"status": "ok"}


def test_texts_of_all_kinds(client: TestClient) -> None:
    for text in ("a\0b", "🙂", " \n ", "\ufeffa", "{}%s$1", "a\r\nb\n\nc\t", "\u202eabc"):
        answer = client.post("/translate", json={"q": text, **PAIR})
        assert answer.status_code == 200
        assert answer.json()["translatedText"] == text.upper()
    long = client.post("/translate", json={"q": "word" * 12_500, **PAIR}).json()["translatedText"]
    assert long.replace(" ", "") == "WORD" * 12_500  # it goes through the model in parts


def test_numbers_as_clients_write_them(client: TestClient) -> None:
    for number in ("2", 2.0, 2):
        answer = client.post("/translate", json={"q": "a", **PAIR, "alternatives": number, "api_key": None})
        assert answer.json()["alternatives"] == ["A!", "A!!"]


def test_detect(client: TestClient) -> None:
    found = client.post("/detect", data={"q": "nichts gespeichert: die Festplatte ist voll"}).json()
    assert found[0]["language"] == "de"
    assert 90 < found[0]["confidence"] <= 100
    assert client.post("/detect", json={"q": "42"}).json() == [{"confidence": 0.0, "language": "en"}]
    assert client.post("/detect", json={"q": ["le disque", "est plein"]}).json()[0]["language"] == "fr"
    assert client.post("/detect").status_code == 400
    assert client.get("/detect").status_code == 405


def test_languages(client: TestClient) -> None:
    # as libretranslatepy asks: GET with a body
    languages = client.request("GET", "/languages", content=b"api_key=1").json()
    codes = ["en", "de", "fr"]
    names = ["English", "German", "French"]
    assert languages == [{"code": c, "name": n, "targets": codes} for c, n in zip(codes, names, strict=True)]


def test_other_endpoints(client: TestClient) -> None:
    settings = client.get("/frontend/settings").json()
    assert (settings["charLimit"], settings["keyRequired"], settings["suggestions"]) == (100_000, False, False)
    assert settings["supportedFilesFormat"] == [".txt", ".html", ".srt"]
    assert client.post("/suggest", data={"q": "a", "s": "b"}).status_code == 403
    assert "swagger" in client.get("/docs").text
    assert set(client.get("/openapi.json").json()["paths"]) >= {"/translate", "/detect", "/languages"}
    assert error_of(client.get("/nowhere")) == "Not Found"


def test_metrics(client: TestClient) -> None:
    client.post("/translate", json={"q": "a secret", **PAIR})
    client.post("/translate", json={"q": "a secret", "source": "en", "target": "zz"})
    client.get("/a-secret")
    text = client.get("/metrics").text
    assert 'hf_moe_ted_requests_total{endpoint="/translate",status="200"} 1.0' in text
    assert 'hf_moe_ted_requests_total{endpoint="/translate",status="400"} 1.0' in text
    assert 'hf_moe_ted_requests_total{endpoint="other",status="404"} 1.0' in text
    assert 'hf_moe_ted_request_seconds_count{endpoint="/translate"} 2.0' in text
    assert "hf_moe_ted_characters_total 8.0" in text
    assert "hf_moe_ted_waiting_characters 0.0" in text
    assert "secret" not in text


def test_failure_in_the_model(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = client.post("/translate", json={"q": f"secret {BAD_WORD}", **PAIR})
    assert answer.status_code == 500
    assert BAD_WORD not in error_of(answer)
    assert client.post("/translate", json={"q": "a", **PAIR}).json()["translatedText"] == "A"
    assert "RuntimeError" in caplog.text
    assert "translate_batch" in caplog.text  # where it was
    assert "secret" not in caplog.text


@pytest.mark.parametrize("log_texts", [False, True])
def test_texts_in_the_log(make_client: MakeClient, caplog: pytest.LogCaptureFixture, log_texts: bool) -> None:
    caplog.set_level(logging.INFO, "hf_moe_ted")
    client = make_client(log_texts=log_texts)
    client.post("/translate", params={"q": "my secret", **PAIR, "api_key": "k-1"})
    client.post("/translate", json={"q": f"secret {BAD_WORD}", **PAIR})
    assert "POST /translate 200" in caplog.text
    assert ("'my secret' -> 'MY SECRET'" in caplog.text) == log_texts
    assert ("secret" in caplog.text) == log_texts
    assert "k-1" not in caplog.text


def test_cross_origin(make_client: MakeClient) -> None:
    ask = {"headers": {"origin": "https://a.org"}}
    assert "access-control-allow-origin" not in make_client().get("/languages", **ask).headers
    client = make_client(cors_origins=("https://a.org",))
    assert client.get("/languages", **ask).headers["access-control-allow-origin"] == "https://a.org"
    others = client.get("/languages", headers={"origin": "https://b.org"})
    assert "access-control-allow-origin" not in others.headers


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a letter.txt", "Hello.\r\n\r\nYes", "HELLO.\r\n\r\nYES"),
        ("../a.TXT", "\ufeffyes", "\ufeffYES"),
        ("a.html", "<p>yes</p>", "<p>YES</p>"),
        ("a.srt", "1\n00:00:01,000 --> 00:00:02,000\nyes\n", "1\n00:00:01,000 --> 00:00:02,000\nYES\n"),
        ("empty.txt", "", ""),
    ],
)
def test_files(client: TestClient, name: str, content: str, expected: str) -> None:
    answer = client.post("/translate_file", files={"file": (name, content.encode())}, data=PAIR)
    assert answer.status_code == 200
    url = answer.json()["translatedFileUrl"]
    assert url.startswith("http://testserver/download_file/")
    download = client.get(url)
    assert download.content.decode() == expected
    assert download.headers["content-disposition"].startswith("attachment")
    assert "_de." in download.headers["content-disposition"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"file": ("a.pdf", b"a")}, "file format not supported: the name must end with .txt, .html, .srt"),
        ({"file": ("a.txt", b"a\xff")}, "the file is not UTF-8: byte 1 cannot be read"),
        ({"file": ("a.srt", b"a")}, "there is no line with times"),
        ({"other": ("a.txt", b"a")}, "missing file parameter"),
        ({"file": (None, b"a")}, "missing file parameter"),
    ],
)
def test_bad_files(client: TestClient, files: Any, message: str) -> None:
    answer = client.post("/translate_file", files=files, data=PAIR)
    assert answer.status_code == 400
    assert message in error_of(answer)


def test_file_that_is_not_there(client: TestClient) -> None:
    for name in ("a.txt", "..%2f..%2fetc%2fpasswd", "%00"):
        assert client.get(f"/download_file/{name}").status_code == 404
