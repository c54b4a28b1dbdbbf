"""LLM: generation inside a Python program. Submits all prompts at once and drives the engine to the end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax

from jaxserve import uncollected
from jaxserve.beam_search import BeamSearchOutput, BeamSearchParams, beam_search_output
from jaxserve.config import EngineConfig
from jaxserve.devices import expect_devices
from jaxserve.engine import Engine
from jaxserve.errors import InvalidRequestError
from jaxserve.outputs import RequestOutput
from jaxserve.replicas import Replicas
from jaxserve.sampling_params import OutputKind, SamplingParams

Prompt = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": [...]}."""

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, as in OpenAI's chat API."""


class LLM:
    """A model ready to generate.

    Example:
        with LLM("smollm2") as llm:
            print(llm.generate("The sky is", SamplingParams(max_tokens=8))[0].outputs[0].text)
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Loads the model and compiles its programs.

        Args:
            model: a folder, a .gguf file, hf:org/name, or a catalogue name.
            options: the fields of jaxserve.config's dataclasses, e.g. max_model_len, dtype, tensor_parallel_size.

        Raises:
            ConfigError: an option is unknown or cannot work.
            ModelLoadError: the model cannot be loaded.
        """
        expect_devices()
        with uncollected():  # meanwhile, as it takes a second
            from jaxserve.startup import build_engine

        self._use(build_engine(EngineConfig.from_options(model=model, **options)))

    @classmethod
    def from_engine(cls, engine: Engine | Replicas) -> Self:
        """An LLM over an engine that is ready, which it takes over."""
        llm = cls.__new__(cls)
        llm._use(engine)
        return llm

    def _use(self, engine: Engine | Replicas) -> None:
        self.engine = engine
        self._names = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Frees the device memory; the LLM cannot be used afterwards."""
        self.engine.shutdown()

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights in use, by name; see Engine.params."""
        return self.engine.params

    def update_params(self, tree: Any) -> int:
        """Generates with other weights from now on, without a copy where they lie as the engine's do; see Engine.update_params.

        Returns:
            The version of the weights, which outputs carry as `weight_version`.

        Raises:
            WeightsError: the tree is not of the model's form; nothing has changed then.
        """
        return self.engine.update_params(tree)

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own sampling defaults (its generation_config)."""
        return SamplingParams.from_defaults(self.engine.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt.

        Args:
            prompts: one prompt, or several, which then run together.
            sampling_params: for all prompts, or one for each; the model's defaults if not given.
            priority: one for each prompt; the smaller, the sooner it runs. Needs scheduling_policy="priority".
            use_tqdm: show a progress bar.

        Returns:
            One output for each prompt, in their order.

        Raises:
            InvalidRequestError, PromptTooLongError: nothing has been generated then.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params(sampling_params, len(prompts))
        return self._run([(*self._encode(p), s) for p, s in zip(prompts, params, strict=True)], use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers each conversation, through the model's chat template. One conversation or several."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = self._params(sampling_params, len(conversations))
        tokenizer = self._tokenizer("chat")
        work: list[tuple[list[int], str | None, SamplingParams]] = []
        for conversation, s in zip(conversations, params, strict=True):
            plain: list[dict[str, Any]] = [dict(m) for m in conversation]  # type: ignore[arg-type]
            ids = tokenizer.apply_chat_template(
                plain, add_generation_prompt=add_generation_prompt, **(chat_template_kwargs or {})
            )
            work.append((ids, None, s))
        goes_on = bool((chat_template_kwargs or {}).get("continue_final_message"))
        return self._run(work, use_tqdm, continues_text=goes_on)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """Searches the likeliest completions of each prompt.

        Returns:
            One output for each prompt, in their order, with params.beam_width sequences, the best first.

        Raises:
            InvalidRequestError, PromptTooLongError: nothing has been generated then.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        outputs = self._run([(*self._encode(p), params.sampling_params()) for p in prompts], use_tqdm)
        return [beam_search_output(output, params, self.engine.tokenizer) for output in outputs]

    def _tokenizer(self, purpose: str) -> Any:
        if self.engine.tokenizer is None:
            raise InvalidRequestError(f"{purpose} needs a tokenizer, and none is loaded; give prompt_token_ids to generate()")
        return self.engine.tokenizer

    def _encode(self, prompt: Prompt) -> tuple[list[int], str | None]:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if isinstance(prompt, Mapping) and "prompt_token_ids" in prompt:
            return list(prompt["prompt_token_ids"]), text
        if not isinstance(text, str):
            raise InvalidRequestError('a prompt is a string, {"prompt": text} or {"prompt_token_ids": [...]}', param="prompt")
        return self._tokenizer("a text prompt").encode(text), text

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        params = [given] * count if isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise InvalidRequestError(f"{count} prompts need 1 or {count} sampling_params; got {len(params)}")
        return [p.with_(output_kind=OutputKind.FINAL_ONLY) for p in params]

    def _run(
        self,
        work: list[tuple[list[int], str | None, SamplingParams]],
        show_progress: bool,
        priorities: Sequence[int] | None = None,
        continues_text: bool = True,
    ) -> list[RequestOutput]:
        priorities = [0] * len(work) if priorities is None else priorities
        if len(priorities) != len(work):
            raise InvalidRequestError(f"{len(work)} prompts need {len(work)} priorities; got {len(priorities)}", param="priority")
        ids: list[str] = []
        try:
            for (token_ids, text, params), priority in zip(work, priorities, strict=True):
                name = f"llm-{next(self._names)}"
                options: dict[str, Any] = {"prompt": text, "priority": priority, "continues_text": continues_text}
                ids.append(self.engine.add_request(token_ids, params, request_id=name, **options))
            outputs = self._drive(len(ids), show_progress)
        except BaseException:
            for request_id in ids:
                self.engine.abort(request_id)
            raise
        return [outputs[request_id] for request_id in ids]

    def _drive(self, total: int, show_progress: bool) -> dict[str, RequestOutput]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        outputs: dict[str, RequestOutput] = {}
        num_tokens = 0
        with Progress(*columns, disable=not show_progress) as progress:
            task = progress.add_task("prompts", total=total, rate="")
            while self.engine.has_work:
                for output in self.engine.step():
                    outputs[output.request_id] = output
                    num_tokens += sum(len(c.token_ids) for c in output.outputs)
                    rate = num_tokens / max(progress.tasks[0].elapsed or 0, 1e-9)
                    progress.update(task, advance=1, rate=f"{rate:,.1f} tokens/s")
        return outputs
