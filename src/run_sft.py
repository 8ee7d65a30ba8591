"""
Supervised fine-tuning on conversations with tools: phase 5, and agents. With `train_router: true` the width router
learns by itself, from the same conversations, which widths they need.

    accelerate launch src/run_sft.py recipes/tiny/phase5.yaml
    accelerate launch src/run_sft.py recipes/tiny/phase5.yaml --max_steps 10 --mix calculator=1.0,tic_tac_toe=0.5
    accelerate launch src/run_sft.py recipes/router/router.yaml --router_budget 0.5
"""

from adamba.kept_help import print_kept_help

if __name__ == "__main__":
    print_kept_help()  # before the imports below, which take seconds

from adamba.data import log_mix
from adamba.data.arguments import DataArguments
from adamba.errors import UserError, user_errors
from adamba.launch import is_true
from adamba.loading import ModelArguments, check_length, load_model_and_tokenizer
from adamba.recipe import parse
from adamba.training.elastic import ElasticArguments, check_elastic
from adamba.training.freezing import freeze_idle
from adamba.training.lora import DORA_IS_WHOLE, LoraArguments, learning_gates, merge_adapters, peft_config
from adamba.training.routing import RouterArguments, RouterTrainer, prepare_router_run, set_budget
from adamba.training.session import finish, logger, measures, start, train
from adamba.training.sft import MixSFTConfig, MixSFTTrainer, eval_datasets, evaluate_sources, token_rows


@user_errors()
def main() -> None:
    model_args, data_args, elastic_args, router_args, lora_args, args, recipe = parse(
        ModelArguments, DataArguments, ElasticArguments, RouterArguments, LoraArguments, MixSFTConfig
    )
    inputs = {"model": model_args.model_name_or_path} if model_args.model_name_or_path else {}
    inputs |= data_args.files_read()
    output_dir = start(args, recipe, inputs)
    logger.info("mix: %s", log_mix(data_args.mix))

    model, tokenizer = load_model_and_tokenizer(model_args, data_args, training=True)
    check_length(model, args.max_length)
    check_elastic(model, elastic_args, recipe.path)
    if elastic_args.elastic and lora_args.use_peft and is_true("ACCELERATE_USE_FSDP"):
        raise UserError(
            "elastic: with use_peft it does not run under FSDP, which would split the head; use zero3.yaml"
        )
    if elastic_args.elastic and lora_args.use_peft and lora_args.use_dora:
        raise UserError(f"{DORA_IS_WHOLE}; leave it out, or elastic")
    freeze_idle(model, elastic_args)

    if router_args.train_router:
        if lora_args.use_peft:
            raise UserError(
                "train_router: trains the router alone; leave out use_peft, nothing would teach its adapters"
            )
        prepare_router_run(model, router_args, args)
    trainer_class = RouterTrainer if router_args.train_router else MixSFTTrainer
    trainer = trainer_class(
        model=model,
        train_dataset=token_rows("train", data_args, tokenizer, args),
        eval_dataset=eval_datasets(data_args, tokenizer, args),
        args=args,
        processing_class=tokenizer,
        sources=list(data_args.mix),
        elastic_args=elastic_args,
        peft_config=peft_config(lora_args, model, learning_gates(model)),
    )
    trained = train(trainer)
    trained |= evaluate_sources(trainer, data_args.mix)
    if router_args.train_router:
        trained |= set_budget(trainer, router_args.router_budget, data_args.mix)
    merge_adapters(trainer)
    rows_seen = trained["train_steps"] * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    tokens_seen = trainer.state.num_input_tokens_seen or rows_seen * args.max_length  # packed rows all have max_length
    metrics = trained | measures(trainer, trained["train_seconds"], tokens_seen, tokens_seen // rows_seen)
    finish(trainer, tokenizer, output_dir, recipe, metrics, inputs)


if __name__ == "__main__":
    main()
