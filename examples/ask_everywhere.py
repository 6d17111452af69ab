"""Asks one server in the ways of three APIs and shows that they are one: chats, responses and messages have the same
tokens, and the tokens of a text go there and back. Needs `pip install openai anthropic`, and a chat-tuned folder.

soli serve FOLDER &
python examples/ask_everywhere.py "Why is the sky blue?"
python examples/ask_everywhere.py "Why is the sky blue?" http://127.0.0.1:9000
"""

import os
import sys

import httpx

try:
    from anthropic import Anthropic, AnthropicError
    from openai import OpenAI, OpenAIError
except ModuleNotFoundError as error:
    sys.exit(f"ask_everywhere.py needs the package {error.name}; install it with: pip install {error.name}")

KEY = os.environ.get("SOLI_API_KEY", "none")
TOKENS = 60


def main(question: str, address: str = "http://127.0.0.1:8000") -> None:
    openai = OpenAI(base_url=f"{address}/v1", api_key=KEY)
    anthropic = Anthropic(base_url=address, api_key=KEY)
    model = next(iter(openai.models.list())).id
    turns = [{"role": "user", "content": question}]

    chat = openai.chat.completions.create(model=model, messages=turns, temperature=0, max_tokens=TOKENS)
    print("chat      ", chat.choices[0].message.content)
    response = openai.responses.create(model=model, input=question, temperature=0, max_output_tokens=TOKENS)
    print("responses ", response.output_text)
    print("messages   ", end="")
    greedy = {"temperature": 0}
    with anthropic.messages.stream(model=model, messages=turns, max_tokens=TOKENS, extra_body=greedy) as stream:
        for text in stream.text_stream:
            print(text, end="", flush=True)
    print()

    counted = anthropic.messages.count_tokens(model=model, messages=turns).input_tokens
    print(f"the prompt has {counted}, {chat.usage.prompt_tokens} and {response.usage.input_tokens} tokens")
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": question, "add_special_tokens": False}
    tokens = httpx.post(f"{address}/tokenize", json=body, headers=headers).raise_for_status().json()["tokens"]
    text = httpx.post(f"{address}/detokenize", json={"tokens": tokens}, headers=headers).raise_for_status().json()
    print(f"the question has {len(tokens)}; back from them: {text['prompt']}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python examples/ask_everywhere.py QUESTION [ADDRESS]")
    try:
        main(*sys.argv[1:])
    except (OpenAIError, AnthropicError, httpx.HTTPError) as error:
        sys.exit(f"ask_everywhere.py: no answer ({error}); is a chat-tuned folder served at that address?")
