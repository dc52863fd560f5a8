"""The Hub of the tests against the clients it is made for: huggingface_hub and transformers."""

import json

import pytest
from local_hub import USER, LocalHub, run_python


def test_upload_and_download(local_hub: LocalHub) -> None:
    script = """
        import json
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        api = HfApi()
        repo_id = api.create_repo("sample").repo_id
        api.create_repo("sample", exist_ok=True)
        first = api.upload_file(repo_id=repo_id, path_in_repo="notes/a b.txt", path_or_fileobj=b"one").oid
        api.create_branch(repo_id, branch="draft/1", revision=first)
        api.upload_file(repo_id=repo_id, path_in_repo="model.safetensors", path_or_fileobj=bytes(5000))
        api.upload_file(repo_id=repo_id, path_in_repo="notes/a b.txt", path_or_fileobj=b"two")
        api.delete_file(repo_id=repo_id, path_in_repo="notes/a b.txt", revision="draft/1")

        def read(**options):
            return Path(hf_hub_download(repo_id, "notes/a b.txt", **options)).read_text()

        print(json.dumps({
            "user": api.whoami()["name"],
            "files": sorted(api.list_repo_files(repo_id)),
            "files_of_draft": api.list_repo_files(repo_id, revision="draft/1"),
            "tree": sorted(item.path for item in api.list_repo_tree(repo_id, recursive=True)),
            "top": sorted(item.path for item in api.list_repo_tree(repo_id)),
            "texts": [read(), read(revision=first)],
            "weights": len(Path(snapshot_download(repo_id), "model.safetensors").read_bytes()),
        }))
    """
    result = json.loads(run_python(script, local_hub.env()))
    assert result == {
        "user": USER,
        "files": ["model.safetensors", "notes/a b.txt"],
        "files_of_draft": [],
        "tree": ["model.safetensors", "notes", "notes/a b.txt"],
        "top": ["model.safetensors", "notes"],
        "texts": ["two", "one"],
        "weights": 5000,
    }
    files = local_hub.files(f"{USER}/sample")
    assert files["notes/a b.txt"].lfs_oid is None
    assert files["model.safetensors"].lfs_oid in local_hub.state.lfs_objects


def test_datasets(local_hub: LocalHub) -> None:
    script = """
        from huggingface_hub import HfApi, hf_hub_download

        api = HfApi()
        options = {"repo_id": "someone/data", "repo_type": "dataset"}
        api.create_repo(**options)
        api.upload_file(**options, path_in_repo="a.parquet", path_or_fileobj=b"columns")
        print(open(hf_hub_download(**options, filename="a.parquet")).read())
    """
    assert run_python(script, local_hub.env()).strip() == "columns"
    assert list(local_hub.files("someone/data", kind="datasets")) == ["a.parquet"]


def test_what_is_missing_raises(local_hub: LocalHub) -> None:
    script = """
        from huggingface_hub import HfApi, create_repo, hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError,
        )

        def expect(error, call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except error as raised:
                print(type(raised).__name__)

        repo_id = create_repo("sample").repo_id
        expect(EntryNotFoundError, hf_hub_download, repo_id, "absent.txt")
        expect(RevisionNotFoundError, hf_hub_download, repo_id, "a.txt", revision="absent")
        expect(RepositoryNotFoundError, hf_hub_download, "tester/absent", "a.txt")
        expect(RepositoryNotFoundError, HfApi().model_info, repo_id, token=False)
        expect(HfHubHTTPError, create_repo, "sample")
        expect(HfHubHTTPError, HfApi().list_repo_refs, repo_id)
    """
    assert run_python(script, local_hub.env()).split() == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
        "HfHubHTTPError",
        "HfHubHTTPError",
    ]


def test_model_and_tokenizer(local_hub: LocalHub) -> None:
    script = """
        import torch
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import Whitespace
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, M2M100Config, M2M100ForConditionalGeneration
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
        )
        config = M2M100Config(
            vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16,
        )
        model = M2M100ForConditionalGeneration(config)
        model.push_to_hub("tester/tiny")
        tokenizer.push_to_hub("tester/tiny")

        loaded = AutoModelForSeq2SeqLM.from_pretrained("tester/tiny")
        assert type(loaded) is type(model)
        weights = model.state_dict()
        assert weights.keys() == loaded.state_dict().keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
        loaded_tokenizer = AutoTokenizer.from_pretrained("tester/tiny")
        assert loaded_tokenizer("hello world").input_ids == tokenizer("hello world").input_ids == [3, 4]
    """
    run_python(script, local_hub.env())
    files = local_hub.files(f"{USER}/tiny")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert files["model.safetensors"].lfs_oid is not None


def test_run_python_shows_the_output_of_a_failure(local_hub: LocalHub) -> None:
    with pytest.raises(AssertionError, match=r"exited with 3\n(?s:.*)printed before"):
        run_python("print('printed before')\nraise SystemExit(3)", local_hub.env())
