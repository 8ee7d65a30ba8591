"""
Train on packed rows: a base or an agent from scratch, and phases 1, 2, 3b and 4b.

    accelerate launch src/run_pretrain.py recipes/tiny/phase1.yaml
    accelerate launch src/run_pretrain.py recipes/tiny/phase2.yaml --max_steps 10 --mix pydoc_topics=1.0
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

import itertools
from pathlib import Path

import torch

from adamba.data import load_mixture, log_mix, pack_rows
from adamba.data.arguments import DataArguments
from adamba.errors import user_errors
from adamba.loading import ModelArguments, check_length, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.training.elastic import ElasticArguments, check_elastic
from adamba.training.freezing import freeze_all_but, freeze_idle
from adamba.training.pretraining import PretrainConfig, PretrainTrainer, sort_where_it_trains
from adamba.training.session import finish, logger, measures, start, train
from adamba.training.sharding import count_weights


@user_errors()
def main() -> None:
    model_args, data_args, elastic_args, args, recipe = parse(
        ModelArguments, DataArguments, ElasticArguments, PretrainConfig
    )
    inputs = {"model": model_args.model_name_or_path} if model_args.model_name_or_path else {}
    inputs |= data_args.files_read()
    output_dir = start(args, recipe, inputs)
    logger.info("mix: %s", log_mix(data_args.mix))

    model, tokenizer = load_model_and_tokenizer(model_args, data_args, training=True)
    check_length(model, args.max_length)
    check_elastic(model, elastic_args, recipe.path)

    rows = load_mixture(data_args.mix, **data_args.mixture_options("train"))
    packed = pack_rows(rows, tokenizer, args.max_length, one_source_per_row=True, seed=data_args.mix_seed)
    if args.sort_by_importance:
        calibration = [row["input_ids"] for row in itertools.islice(packed, args.num_calibration_rows)]
        sort_where_it_trains(model, torch.tensor(calibration), args.device)
        logger.info("sorted channels, heads and units by importance on %d rows", len(calibration))
    freeze_all_but(model, args.train_only)
    freeze_idle(model, elastic_args)
    learning = count_weights(model, only_trainable=True)
    logger.info("%s: %d of %d parameters learn", args.train_only, learning, count_weights(model))

    trainer = PretrainTrainer(
        model=model,
        args=args,
        train_dataset=packed,
        processing_class=tokenizer,
        sources=list(data_args.mix),
        elastic_args=elastic_args,
    )
    trained = train(trainer)
    rows_seen = trained["train_steps"] * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    metrics = trained | measures(trainer, trained["train_seconds"], rows_seen * args.max_length, args.max_length)
    finish(trainer, tokenizer, Path(output_dir), recipe, metrics, inputs)


if __name__ == "__main__":
    main()
