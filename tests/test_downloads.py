"""What lies in the place of a download that went wrong, and what the hub says where it gives nothing."""

import json
import os
import re
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

from ctxlib.files import check_is_itself, check_safetensors, read_json, read_json_object
from ctxlib.params import InputError

ROOT = Path(__file__).resolve().parents[1]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = "\n<!DOCTYPE html>\n<html><body>503 Service Unavailable</body></html>"
CONTENT = json.dumps([{"text": "käse\n"}, {"text": "🙂"}], ensure_ascii=False, indent=1).encode()


@pytest.mark.parametrize("cut", range(len(CONTENT)))
def test_json_that_is_cut_anywhere_is_never_taken_for_whole(tmp_path, cut):
    path = tmp_path / "rows.json"
    path.write_bytes(CONTENT[:cut])
    with pytest.raises(
        InputError, match=r"rows\.json(, line \d+)?: (empty|cut short|malformed JSON).*; fetch it again"
    ):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "a Git-LFS pointer, not the file itself; fetch that with: git lfs pull"),
        (PAGE, "a web page, not the file itself"),
        ("<HTML lang='en'>", "a web page"),
        ('{"a": 1}\n{"a": 2}', r"line 2: malformed JSON .*one row per line belongs in a \.jsonl file"),
        ("[" * 100_000, "malformed JSON"),
        ("9" * 5000, "malformed JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (None, "no such file"),
    ],
)
def test_what_is_no_json_is_told_in_one_line_with_the_remedy(tmp_path, content, said):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"rows\.json.*{said}") as told:
        read_json(path, "ask again")
    assert "\n" not in str(told.value)


def test_whole_files_pass(tmp_path):
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + CONTENT)
    assert read_json(tmp_path / "rows.json") == json.loads(CONTENT)
    with pytest.raises(InputError, match=r"expected keys and values in \{ \}, found list"):
        read_json_object(tmp_path / "rows.json")
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    check_safetensors([tmp_path / "a.safetensors"])
    check_is_itself(tmp_path / "absent")


def test_weights_that_are_cut_anywhere_are_never_taken_for_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(30), "b": torch.ones(2, 2)}, path)
    content = path.read_bytes()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        with pytest.raises(
            InputError, match=rf"a\.safetensors: cut short or damaged, {cut:,} bytes .*; fetch it again"
        ):
            check_safetensors([path])
    path.unlink()
    with pytest.raises(InputError, match=r"a\.safetensors: this file of the weights is missing"):
        check_safetensors([path])


class Hub(BaseHTTPRequestHandler):
    """Refuses as the hub does: by status and the header that its client reads."""

    def do_GET(self):
        repo = next((name for name in ("gated", "absent", "unrevised") if f"some/{name}" in self.path), "absent")
        known = repo == "unrevised" and "resolve/no-such" not in self.path and "revision/no-such" not in self.path
        status, code = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound")}.get(
            repo, (404, "RevisionNotFound")
        )
        self.send_response(404 if known else status)
        self.send_header("X-Error-Code", "EntryNotFound" if known else code)
        self.send_header("X-Error-Message", "refused")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass


ASKS = """
import os
from ctxlib.conversations import load_conversations
from ctxlib.models import load_config, load_model, load_tokenizer
from ctxlib.params import InputError

for repo, revision in (("gated", None), ("absent", None), ("unrevised", "no-such")):
    for what, load in (("tokenizer", load_tokenizer), ("config", load_config), ("model", load_model),
                       ("dataset", load_conversations)):
        try:
            load(f"some/{repo}", revision=revision)
        except InputError as error:
            print(f"{repo} {what}: {error}")
"""


def hub_says(endpoint, tmp_path, **more):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", **more}
    asked = subprocess.run(
        [sys.executable, "-c", ASKS], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert asked.returncode == 0, asked.stderr
    return dict(re.findall(r"^(\w+ \w+): (.*)$", asked.stdout, re.MULTILINE))


def test_what_the_hub_refuses_names_the_page_and_the_way_in(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = hub_says(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert len(said) == 12
    for asked, message in said.items():
        repo, what = asked.split()
        page = f"https://huggingface.co/{'datasets/' if what == 'dataset' else ''}some/{repo}"
        expected = {
            "gated": f"it is gated: ask for access at {page}, then log in with: hf auth login",
            "absent": f"see {page}; correct the name or, if it is private: hf auth login",
            "unrevised": f"there is no revision 'no-such'; choose a branch, tag or commit from {page}/commits/main",
        }
        assert expected[repo] in message, (asked, message)


def test_without_a_network_the_page_is_named_and_what_to_do(tmp_path):
    said = hub_says("https://huggingface.co", tmp_path, HF_HUB_OFFLINE="1")
    assert len(said) == 12
    assert all(
        "the hub cannot be reached, and the files are not in the cache; try again online" in m for m in said.values()
    )
