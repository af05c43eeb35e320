"""Let an instruct model answer prompts, and write the conversations as chat data for distilling its students.

    python benchmarks/real/own_answers.py --teacher CHECKPOINT_DIR --prompts prompts.txt --out answers.jsonl

A line of the prompts is one prompt. Each line of the output is `{"messages": [user, assistant]}`, for
`litgpt distill --data HFText --data.path answers.jsonl`. Started again, the script adds the answers that are missing.
"""

import argparse
import json
from pathlib import Path

import torch
from litgpt.generate.base import generate_fn
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tqdm import tqdm

from litgpt_whittle import load_model
from litgpt_whittle.data.chat import find_template


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, required=True, help="a litgpt checkpoint with a chat template")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt per line")
    parser.add_argument("--out", type=Path, required=True, help="the conversations, as JSON lines")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0, help="each answer depends on the seed and its prompt's number")
    args = parser.parse_args()

    prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    template = find_template(None, args.teacher, tokenizer := Tokenizer(args.teacher))
    if template is None:
        parser.error(f"{args.teacher} has no chat template")
    n_finished = finished(args.out)
    model, stop_ids = load_model(args.teacher), stop_tokens(args.teacher, tokenizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a", encoding="utf-8") as out:
        for i, prompt in enumerate(tqdm(prompts[n_finished:], "answers"), n_finished):
            torch.manual_seed(hash((args.seed, i)))
            asked = [{"role": "user", "content": prompt}]
            text = template.render(asked, str(args.prompts), prompts=True)
            ids = tokenizer.processor.encode(text, add_special_tokens=False).ids
            found = answer(model, ids, args.max_new_tokens, args.temperature, stop_ids)
            if found is None:
                continue  # an answer that was cut off would teach the student to stop anywhere
            content = tokenizer.processor.decode(found).strip()
            out.write(json.dumps({"messages": [*asked, {"role": "assistant", "content": content}], "prompt": i}) + "\n")
            out.flush()


def finished(out: Path) -> int:
    """Return the number of prompts up to the last one with an answer; remove a line that was cut off by a crash."""
    if not out.is_file():
        return 0
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    out.write_text("".join(whole), encoding="utf-8")
    return json.loads(whole[-1])["prompt"] + 1 if whole else 0


def stop_tokens(checkpoint_dir: Path, tokenizer: Tokenizer) -> tuple[list[int], ...]:
    """Return the tokens that end an answer: those of generation_config.json, else EOS."""
    path = checkpoint_dir / "generation_config.json"
    found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    found = tokenizer.eos_id if found is None else found
    return tuple([i] for i in (found if isinstance(found, list) else [found]))


@torch.inference_mode()
def answer(
    model: GPT, prompt: list[int], max_new_tokens: int, temperature: float, stop_ids: tuple[list[int], ...]
) -> list[int] | None:
    """Return the tokens of an answer, None if it does not end within `max_new_tokens`."""
    length = len(prompt) + max_new_tokens + 1
    if length > model.config.block_size:
        return None
    model.clear_kv_cache()
    model.max_seq_length = length
    model.set_kv_cache(batch_size=1)
    ids = torch.tensor(prompt)
    sampled = generate_fn(
        model, ids, length, temperature=temperature, top_p=1.0 if temperature else 0.0, stop_tokens=stop_ids,
        include_prompt=False, include_eos=False,
    )  # fmt: skip
    found = [int(token) for token in sampled]
    return found if len(found) <= max_new_tokens else None


if __name__ == "__main__":
    main()
