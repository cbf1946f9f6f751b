"""lm-eval: a small task of multiple choice over /v1/completions, which asks for the logprobs of prompts given as ids."""

import atexit
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from recipes import BASE, MODEL, recipe, run

QUESTIONS = (
    ("The capital of France is", [" Paris", " seventeen", " blue"], 0),
    ("The opposite of hot is", [" banana", " cold", " Tuesday"], 1),
    ("One, two, three,", [" window", " purple", " four"], 2),
    ("The sun rises in the", [" east", " sandwich", " never"], 0),
    ("Monday, Tuesday,", [" potato", " Wednesday", " run"], 1),
    ("Water freezes into", [" music", " paper", " ice"], 2))


@recipe
def multiple_choice() -> None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="octavo-lm-eval-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "data.jsonl").write_text("\n".join(
        json.dumps({"question": question, "choices": choices, "answer": answer}) for question, choices, answer in QUESTIONS))
    (folder / "octavo_mc.yaml").write_text(json.dumps({
        "task": "octavo_mc", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}]}))
    arguments = f"model={MODEL},base_url={BASE}/completions,tokenizer={os.environ['OCTAVO_TOKENIZER']}," \
                "tokenizer_backend=huggingface,num_concurrent=4,max_retries=1"
    command = [str(pathlib.Path(sys.executable).with_name("lm-eval")), "run", "--model", "local-completions", "--model_args",
               arguments, "--tasks", "octavo_mc", "--include_path", str(folder), "--output_path", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "x"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (folder / "out").rglob("results*.json")
    assert json.loads(report.read_text())["results"]["octavo_mc"]["acc,none"] >= 0.8, report.read_text()[:1000]


run()
