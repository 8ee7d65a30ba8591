"""Recipe keys that say what a run reads; the same in every script."""

from dataclasses import dataclass, field
from typing import Any, Literal

from adamba.data.cards import find_cards_dir
from adamba.data.mixture import parse_mix
from adamba.errors import UserError
from adamba.tasks import TASKS
from adamba.tasks.task import refuse_unknown_settings

TASKS_OF_FILES = {"questions"}  # tasks whose instances are read from the user's file: its setting `data_file`


@dataclass
class DataArguments:
    mix: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Source -> relative weight: calculator=1.0,tic_tac_toe=0.5."}
    )
    task_settings: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Task -> settings of its generator, for instance its depth."}
    )
    data_files: dict[str, str] = field(
        default_factory=dict, metadata={"help": "Source -> local file or folder that stands in for the Hub."}
    )
    cards_dir: str = field(default="data_cards", metadata={"help": "Folder of the data cards."})
    on_bad_file: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "At a data file that is cut off or broken: stop, or skip to what is whole."}
    )
    mix_seed: int = field(default=0, metadata={"help": "Of the mixture and the procedural tasks."})

    def __post_init__(self) -> None:
        if not self.mix:
            raise UserError("mix: missing; give sources and weights, for instance calculator=1.0,tic_tac_toe=0.5")
        try:
            self.mix = parse_mix(self.mix)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name in TASKS.keys() & self.task_settings.keys():
            refuse_unknown_settings(TASKS[name], self.task_settings[name])
        for name in TASKS_OF_FILES & self.data_files.keys():
            settings = self.task_settings.get(name, {})
            self.task_settings = self.task_settings | {name: settings | {"data_file": self.data_files[name]}}
        self.data_files = {name: path for name, path in self.data_files.items() if name not in TASKS_OF_FILES}

    def files_read(self) -> dict[str, str]:
        """What the rows depend on besides code and keys: local files of the mix, and the cards that read them."""
        files = {name: path for name, path in self.data_files.items() if name in self.mix}
        cards = find_cards_dir(self.cards_dir)
        for name in self.mix:
            if "data_file" in self.task_settings.get(name, {}):
                files[name] = self.task_settings[name]["data_file"]
            card = cards / f"{name}.md"
            if name not in TASKS and card.is_file():
                files[f"card of {name}"] = str(card)
        return files

    def mixture_options(self, split: str, source: str | None = None, **more) -> dict[str, Any]:
        """Keyword arguments of `load_mixture`, for the whole mix or for one source of it."""
        options = {"split": split, "seed": self.mix_seed, "settings": self.task_settings}
        others = self.mix.keys() - {source} if source is not None else ()
        data_files = {name: path for name, path in self.data_files.items() if name not in others}
        files = {"data_files": data_files, "on_bad_file": self.on_bad_file, "cards_dir": self.cards_dir}
        return {**options, **files, **more}
