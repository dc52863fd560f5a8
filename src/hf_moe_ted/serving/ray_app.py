"""The server as an application of Ray Serve: replicas on several GPUs or machines, scaled by its configuration.

`serve run examples/serving/ray_serve.yaml` starts it; see docs/serving.md.
"""

from pathlib import Path

try:
    from pydantic import BaseModel, ConfigDict
    from ray import serve
except ImportError as error:
    raise ValueError(f"the application of Ray Serve needs {error.name}: `pip install 'hf-moe-ted[ray]'`") from error

from fastapi import FastAPI


class RayArguments(BaseModel):
    """`args` of the application in the configuration of Ray Serve.

    Attributes:
        model: folder of the model with its tokenizer, at the same path on each machine.
        api_keys: file of keys, one per line.
        settings: fields of [`ServerSettings`], by name. Limits hold for each replica.
        num_beams, batch_tokens, max_new_tokens: see [`TextTranslator`].
        dtype, device: as in `hf-moe-ted serve`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    api_keys: Path | None = None
    settings: dict[str, float] = {}
    num_beams: int = 4
    batch_tokens: int = 4096
    max_new_tokens: int | None = None
    dtype: str | None = None
    device: str | None = None


def build(args: RayArguments) -> serve.Application:
    """The application; its deployment `Translator` is configured like any other of Ray Serve."""

    def app() -> FastAPI:  # in each replica; the process that builds the application needs no model and no torch
        from ..tensors.whole_model import load_model_and_tokenizer
        from ..translation.text_translator import TextTranslator
        from .api_keys import ApiKeys
        from .app import create_app
        from .batched_translator import BatchedTranslator
        from .settings import ServerSettings

        model, tokenizer = load_model_and_tokenizer(args.model, args.dtype or "auto", args.device, "model")
        translator = TextTranslator(
            model,
            tokenizer,
            num_beams=args.num_beams,
            batch_tokens=args.batch_tokens,
            max_new_tokens=args.max_new_tokens,
        )
        translator.warm_up()
        api_keys = None if args.api_keys is None else ApiKeys.from_file(args.api_keys)
        settings = ServerSettings(api_keys=api_keys, **args.settings)  # type: ignore[arg-type]  # checked there
        return create_app(BatchedTranslator(translator), settings)

    deployment = serve.deployment(serve.ingress(app)(), name="Translator")
    return deployment.bind()  # type: ignore[attr-defined]  # of a class it is a Deployment


__all__ = ["RayArguments", "build"]
