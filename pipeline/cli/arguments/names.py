"""Options that are near to what was typed: misspelt, or called otherwise by other programs."""

from __future__ import annotations

from collections.abc import Collection

from train.option import nearest

# What other programs and papers call our options, without dashes. Of several, those that the
# command has are meant.
_CALLED = {
    "learning-rate": "lr learn-rate rate step-size",
    "batch-size": "bs batch batches",
    "epochs": "epoch num-epochs n-epochs max-epochs nepochs e iterations",
    "hidden-size": "hidden hidden-dim hidden-units rnn-size lstm-size decoder-dim",
    "embedding-size": "embed embed-size embed-dim emb-size emb-dim embedding-dim word-dim",
    "num-layers": "layers n-layers nlayers",
    "weight-decay": "wd l2",
    "clip-norm": "clip clip-grad grad-clip clip-grad-norm max-grad-norm gradient-clipping",
    "average-decay": "ema ema-decay",
    "label-smoothing": "smoothing",
    "warmup": "warmup-steps warmup-ratio warm-up",
    "decay": "scheduler lr-scheduler lr-decay schedule",
    "dropout": "drop drop-rate drop-prob p",
    "min-count": "min-freq min-word-count min-occurrences threshold word-threshold vocab-threshold",
    "self-critical-epochs": "scst rl cider-epochs self-critical rl-epochs",
    "patience": "early-stopping early-stop es-patience",
    "select-by": "metric monitor criterion best-by",
    "save-every": "save-steps save-interval checkpoint-every save-step",
    "log-every": "log-steps log-interval log-step print-every print-freq",
    "seed": "random-seed random-state manual-seed",
    "encoder": "encoder-path cnn",
    "decoder": "decoder-path rnn",
    "vocab": "vocab-path vocabulary dictionary",
    "device": "gpu gpus cuda gpu-id",
    "precision": "fp16 bf16 amp half dtype float16 bfloat16 mixed-precision",
    "workers": "num-workers n-workers threads num-threads j",
    "resume": "continue restore",
    "overwrite": "force f clobber replace",
    "from-model": "init-from pretrained finetune fine-tune start-from pretrained-model ckpt model",
    "from-cache": "cache train-cache train features data input i train-features from",
    "from": "source input i vocab captions cache data from-cache",
    "cache": "features data input from-cache val-cache test-cache i",
    "val-cache": "val validation val-data val-features valid validation-cache eval-cache",
    "val-list": "val-split val-files validation-list",
    "val-share": "val-ratio val-fraction validation-split test-size holdout held-out",
    "model": "checkpoint ckpt run from-model model-path m load load-from",
    "out": "output o output-dir out-dir outdir save save-dir output-path dest model-path name run",
    "images": "image photos image-dir images-dir img-dir image-folder image-root input i data path",
    "captions": "caption annotations annotation ann-file caption-path labels references refs num-"
    "captions n num-return-sequences",
    "backbone": "arch architecture encoder network cnn model model-name net a",
    "weights": "pretrained checkpoint ckpt weight weights-path",
    "image-size": "size resolution img-size input-size crop-size resize image-res",
    "views": "augment augmentation crops tta view",
    "view": "views tta",
    "limit": "max-photos max-images n subset num num-images max-samples head",
    "only": "list file-list names ids subset include filter",
    "split": "splits subset fold",
    "shard": "part rank world-size shards",
    "dry-run": "dry plan n simulate what-if",
    "image-column": "image-col filename-column path-column",
    "caption-column": "caption-col text-column",
    "beam-size": "beam beams num-beams beam-width k b",
    "max-length": "max-len max-words max-tokens max-new-tokens length",
    "length-penalty": "alpha lenpen length-alpha",
    "no-repeat-ngram": "no-repeat-ngram-size no-repeat block-ngram",
    "groups": "num-groups num-beam-groups group",
    "diversity": "diversity-penalty",
    "sample": "sampling do-sample random stochastic",
    "temperature": "temp t tau",
    "top-p": "nucleus p topp",
    "predictions": "results result-file prediction hypotheses res-file",
    "human": "humans people",
    "sheet": "contact-sheet montage grid collage",
    "sidecar": "sidecars txt write-txt",
    "sidecar-folder": "sidecar-dir",
    "ids": "image-info image-ids",
    "null": "print0 zero null-data z",
    "log-probs": "logprobs probabilities probs scores",
    "no-meteor": "fast skip-meteor",
    "trials": "n-trials num-trials n runs",
    "jobs": "n-jobs num-jobs workers parallel j",
    "timeout-s": "timeout time-limit max-time",
    "quiet": "silent",
    "verbose": "debug",
    "version": "v ver",
    "unreadable": "errors bad broken failed",
    "deduplicate": "dedup dedupe unique",
    "json": "as-json output-json format",
    "help": "usage man",
}
_ALIASES: dict[str, list[str]] = {}
for _ours, _theirs in _CALLED.items():
    for _name in _theirs.split():
        _ALIASES.setdefault(_name, []).append(_ours)


def near_options(typed: str, known: Collection[str]) -> list[str]:
    """The options of a command that `typed` may stand for, the likeliest first; at most three.

    typed: with its dashes and without a value. known: the command's options, with dashes.
    """
    name = typed.lstrip("-").replace("_", "-").lower()
    called = [f"--{ours}" for ours in _ALIASES.get(name, ()) if f"--{ours}" in known]
    if len(typed.lstrip("-")) == 1:  # near to nothing, or to everything
        return called
    return list(dict.fromkeys([*called, *nearest(f"--{name}", known)]))[:3]
