"""Asks a server as any OpenAI client does, and shows which experts were activated. Needs `pip install openai`.

soli serve &
python examples/ask.py "The river"
python examples/ask.py "The river" http://127.0.0.1:9000/v1
"""

import os
import sys

try:
    from openai import OpenAI, OpenAIError
except ModuleNotFoundError:
    sys.exit("ask.py needs the package openai; install it with: pip install openai")


def main(prompt: str, address: str = "http://127.0.0.1:8000/v1") -> None:
    client = OpenAI(base_url=address, api_key=os.environ.get("SOLI_API_KEY", "none"))
    model = next(iter(client.models.list()))
    chunks = client.completions.create(
        model=model.id,
        prompt=prompt,
        max_tokens=40,
        temperature=0.7,
        seed=1,
        stream=True,
        extra_body={"soli": {"routing": "summary"}},
    )
    for chunk in chunks:
        for choice in chunk.choices:
            print(choice.text, end="", flush=True)
        summary = getattr(chunk, "soli", {}).get("experts")
    print()
    for layer in summary[0] if summary else []:
        counts = layer["counts"]
        busiest = sorted(range(len(counts)), key=lambda expert: -counts[expert])[:4]
        often = ", ".join(f"{expert} ({counts[expert]} times)" for expert in busiest)
        print(f"{layer['layer']}: {sum(map(bool, counts))} of {len(counts)} experts activated, most often {often}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python examples/ask.py PROMPT [ADDRESS]")
    try:
        main(*sys.argv[1:])
    except OpenAIError as error:
        sys.exit(f"ask.py: no answer ({error}); is `soli serve` running at that address?")
