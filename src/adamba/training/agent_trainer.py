"""GRPOTrainer for agents: tokens counted and limited, tools counted by name, unreadable calls answered."""

import inspect
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from adamba.errors import UserError
from adamba.model import AdambaForCausalLM
from adamba.model.decoding_adamba import OPTIONS
from adamba.rewards.correctness import correctness
from adamba.tools.calls import OPEN, parse_tool_calls
from adamba.training.conversations import Conversations, fits
from adamba.training.generations import load_generation, save_generation
from adamba.training.optimizers import OptimizerMixin

logger = logging.getLogger("adamba")

UNREADABLE = "unreadable_call"
TOKENS = "num_generated_tokens"
# Of equal rewards TRL's group mean may be off by rounding: advantages up to 0.0048 where there is nothing to learn.
ROUNDING = 0.005


class AgentGRPOTrainer(OptimizerMixin, GRPOTrainer):
    """`GRPOTrainer` that also

    - logs `num_generated_tokens`, all that the model wrote so far, and stops after `max_generated_tokens` of them;
    - logs `tools/<name>/call_frequency` (calls an episode) and `tools/<name>/failure_frequency` (share of calls that
      could not be read, do not fit the tool, or that the environment refused);
    - answers a call that cannot be read with what is wrong with it; TRL would take it for a final text;
    - keeps the caches of episodes between their turns where it can (`adamba.training.conversations`);
    - trains only on rows that have an advantage, where the others have no gradient: `entropy` and `clip_ratio` are
      then of these rows;
    - counts each held-out row once in `eval_reward`, `eval_rewards/*/mean` and `eval_score_*`: TRL takes means of
      batches, also of rows that are there a second time, to fill the last one.
    """

    def __init__(self, *args: Any, max_generated_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        num_rows, needed = len(self.train_dataset), self.args.generation_batch_size // self.num_generations
        if num_rows < needed:  # TRL's sampler leaves out what does not fill a batch, and the run would end at step 0
            raise UserError(
                f"num_prompts: {num_rows} left to train on (unsolved_fraction may leave out some) do not fill a batch "
                f"of {needed}: per_device_train_batch_size × steps_per_generation × processes / num_generations"
            )
        if self.ref_model is not None:  # TRL asks it without a word on caches, and would have one of each row
            self.accelerator.unwrap_model(self.ref_model).config.use_cache = False
        self._conversations: Conversations | None = None
        self._said_how = False
        self._evaluated: dict[str, list[float]] = defaultdict(list)
        self._num_read = self._num_held_out = 0  # rows of an evaluation: by this process, of all
        self.num_generated_tokens = 0
        self.max_generated_tokens = max_generated_tokens
        self.add_callback(_TokenBudget(self))
        if self.tools:
            answer_unreadable_calls(self._tokenizer)

    def count_on(self, state: TrainerState) -> None:
        """Go on counting from what a run that stands at `state` had generated."""
        counted = [entry[TOKENS] for entry in state.log_history if TOKENS in entry]
        self.num_generated_tokens = int(counted[-1]) if counted else 0

    @property
    def is_at_budget(self) -> bool:
        """Whether all tokens that may be generated are."""
        return self.max_generated_tokens is not None and self.num_generated_tokens >= self.max_generated_tokens

    def _generate(self, prompts: list) -> Any:
        with self._keeping_caches():
            output = super()._generate(prompts)
        if self.model.training:  # counted here: `mask_truncated_completions` takes rows out of the masks later
            _, completions, own, *_ = output
            written = sum(map(len, completions)) if own is None else sum(map(sum, own))
            counted = torch.tensor(written, device=self.accelerator.device)
            self.num_generated_tokens += int(self.accelerator.gather(counted).sum())
            self._metrics["train"][TOKENS] = [float(self.num_generated_tokens)]
        return output

    @contextmanager
    def _keeping_caches(self) -> Iterator[None]:
        """Caches live as long as the episodes of one batch: the next one has other weights."""
        if not self._said_how:
            self._said_how, why = True, self._reads_anew()
            how = "keep their caches between turns" if why is None else f"are read anew each turn: {why}"
            logger.info("episodes %s", how)
        if self._can_keep_caches():
            self._conversations = Conversations(
                self.generation_config, self.eos_token_ids, self._tokenizer.pad_token_id
            )
        try:
            yield
        finally:
            self._conversations = None

    def _can_keep_caches(self) -> bool:
        return self._reads_anew() is None

    def _reads_anew(self) -> str | None:
        """Why `Conversations` would not decode as `generate` does; None where it does, and caches are kept."""
        if self.use_vllm or self.use_transformers_continuous_batching:
            return "another engine generates"
        if self.args.generation_kwargs:
            return "generation_kwargs are given"
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(model, AdambaForCausalLM):
            return f"the model is a {type(model).__name__}"
        if not fits(model.config):
            return "a layer has a sliding window"
        for key in OPTIONS:
            if getattr(model.generation_config, key, None) is not None:
                return f"the checkpoint's generation config has {key}"
        return None if self.repetition_penalty == 1.0 else "repetition_penalty is not 1"

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        if self._conversations is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        options = {"gradient_checkpointing_kwargs": self.args.gradient_checkpointing_kwargs}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator, **options) as model:
            return self._conversations.turn(model, prompt_ids), None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        return self._rows_that_teach(inputs) if self.model.training and self._only_advantages_teach() else inputs

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """What `_evaluated` has of each held-out row, all processes' together, is what is logged."""
        self._evaluated.clear()
        self._num_read, self._num_held_out = 0, len(dataloader.dataset) * self.num_generations_eval
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        parts = gather_object([dict(self._evaluated)])
        for name in dict.fromkeys(name for part in parts for name in part):
            values = [value for part in parts for value in part.get(name, ())]
            self._metrics["eval"][name] = [sum(values) / len(values)]
        return output

    def _read_held_out(self, num_rows: int) -> int:
        """How many rows of the evaluation's next batch, the first ones, were not there before."""
        # Processes read equal numbers of rows; the first ones come again, on the last of them, to fill the last batch.
        first = self._num_read * self.args.world_size + self.args.process_index * num_rows
        self._num_read += num_rows
        return max(0, min(num_rows, self._num_held_out - first))

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, *args, **kwargs)  # of all processes
        if not self.model.training:
            own = rewards[self.args.process_index * len(inputs) :][: self._read_held_out(len(inputs))]
            totals = (own * self.reward_weights.to(own.device)).nansum(dim=1)
            for row, each, total in zip(inputs, own.tolist(), totals.tolist(), strict=False):
                scored = {name: r for name, r in zip(self.reward_func_names, each, strict=True) if not math.isnan(r)}
                if scored:  # a reward function may leave out a row, as TRL reads a None
                    self._evaluated["reward"].append(total)
                for name, reward in scored.items():
                    self._evaluated[f"rewards/{name}/mean"].append(reward)
                    if name == correctness.__name__:
                        self._evaluated[f"score_{row['environment']}"].append(reward)
        return rewards

    def _save_rng_state(self, output_dir: str) -> None:
        """What each process keeps of its own: what it generated, too."""
        super()._save_rng_state(output_dir)
        save_generation(self, Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            load_generation(self, Path(checkpoint))

    def _only_advantages_teach(self) -> bool:
        """Whether a row without an advantage adds nothing to the loss, neither a term nor to what it is divided by."""
        if self.beta or self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0:
            return False
        return self.scale_rewards == "group" and self.loss_type in ("dapo", "cispo")

    def _teaches(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Which rows have an advantage."""
        return inputs["advantages"].abs() > ROUNDING

    def _rows_that_teach(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As many rows on every process, and one at least, since TRL gathers a figure of each: others fill up."""
        teaches = self._teaches(inputs)
        rows, most = len(teaches), max(1, int(self.accelerator.gather(teaches.sum()).max()))
        teaches[(~teaches).nonzero()[: most - int(teaches.sum())]] = True
        return {
            key: value[teaches] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for key, value in inputs.items()
        }

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        calls: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        for environment, tools in zip(self.environments or [], self._sync_tool_dicts, strict=True):
            for name, tool in tools.items():
                tools[name] = _counted(tool, environment, calls, failures)
            tools[UNREADABLE] = _unreadable(calls, failures)
        num_episodes = len(self._sync_tool_dicts)
        result = super()._tool_call_loop(*args, **kwargs)
        mode = "train" if self.model.training else "eval"
        known = [tool.__name__ for tool in self.tools]
        for name in sorted({*known, UNREADABLE}):
            local = torch.tensor([calls[name], failures[name], num_episodes], device=self.accelerator.device)
            called, failed, episodes = self.accelerator.gather(local).view(-1, 3).sum(0).tolist()
            self._metrics[mode][f"tools/{name}/call_frequency"].append(called / episodes)
            self._metrics[mode][f"tools/{name}/failure_frequency"].append(failed / max(called, 1))
        return result


class _TokenBudget(TrainerCallback):
    """Goes on counting after a resume, and stops at the budget."""

    def __init__(self, trainer: AgentGRPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.count_on(state)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.is_at_budget:
            control.should_training_stop = control.should_log = True
        return control


def _counted(tool: Callable[..., str], environment: Any, calls: Counter, failures: Counter) -> Callable[..., str]:
    """The tool, counting its calls and those that raise or that the environment counts as invalid."""
    name = tool.__name__

    @wraps(tool)
    def counting(**arguments: Any) -> str:
        calls[name] += 1
        before = environment._outcome()["invalid_calls"]
        try:
            inspect.signature(tool).bind(**arguments)
            answer = tool(**arguments)
        except Exception:  # TRL answers with its message; here it is only counted
            failures[name] += 1
            raise
        failures[name] += environment._outcome()["invalid_calls"] > before
        return answer

    return counting


def _unreadable(calls: Counter, failures: Counter) -> Callable[..., str]:
    def answer(error: str) -> str:
        calls[UNREADABLE] += 1
        failures[UNREADABLE] += 1
        return error

    return answer


def answer_unreadable_calls(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Let `tokenizer.parse_response` read a turn whose call is no JSON, has no name, no arguments object or no closing
    tag as a call of `unreadable_call`, whose answer says what is wrong.
    """
    original = type(tokenizer).parse_response

    def parse_response(self: PreTrainedTokenizerBase, response: Any, *args: Any, **kwargs: Any) -> dict:
        text = response if isinstance(response, str) else self.decode(response, skip_special_tokens=True)
        content, calls = parse_tool_calls(text) if OPEN in text else (text, [])
        errors = [call.error for call in calls if call.error]
        if not errors:
            message = original(self, response, *args, **kwargs)
            for written, call in zip(message.get("tool_calls") or (), calls, strict=False):
                if isinstance(written["function"].get("arguments"), str):  # JSON in a text, which TRL cannot pass on
                    written["function"]["arguments"] = call.arguments
            return message
        function = {"name": UNREADABLE, "arguments": {"error": errors[0]}}
        return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}

    tokenizer.parse_response = MethodType(parse_response, tokenizer)
