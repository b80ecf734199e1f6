"""The peer of benchmarks/serving.py: Hugging Face's generate behind FastAPI, as one would write it first.

    python -m benchmarks.hf_server MODEL_FOLDER --port 8901 --threads 1

A request at a time, streamed through TextIteratorStreamer; prompt, answer and temperature as in OpenAI's completions.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


class Body(BaseModel):
    prompt: str
    max_tokens: int = 16
    temperature: float = 1.0


def make_app(folder: str) -> FastAPI:
    app, one_at_a_time = FastAPI(), threading.Lock()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def answer(body: Body) -> Iterator[str]:
        inputs = tokenizer(body.prompt, return_tensors="pt", add_special_tokens=False)
        streamer, found = TextIteratorStreamer(tokenizer, skip_prompt=True), list[torch.Tensor]()

        def generate() -> None:
            found.append(
                model.generate(
                    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=body.max_tokens,
                    do_sample=True, temperature=body.temperature, top_k=0, pad_token_id=0, streamer=streamer,
                )
            )  # fmt: skip

        with one_at_a_time:
            thread = threading.Thread(target=generate)
            thread.start()
            for text in streamer:
                if text:
                    yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
            thread.join()
        n_tokens = found[0].shape[1] - inputs.input_ids.shape[1]
        yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': n_tokens}})}\n\ndata: [DONE]\n\n"

    @app.post("/v1/completions")
    def completions(body: Body) -> StreamingResponse:
        return StreamingResponse(answer(body), media_type="text/event-stream")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    uvicorn.run(make_app(args.model), host="127.0.0.1", port=args.port, log_level="error")


if __name__ == "__main__":
    main()
