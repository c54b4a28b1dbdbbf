"""litellm against a server: chat, stream, completion, as an OpenAI server and as vLLM's."""

import sys

import litellm

url = sys.argv[1]
messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
options = {"messages": messages, "temperature": 0, "max_tokens": 16, "api_key": "none"}
for provider in ("openai", "hosted_vllm"):
    whole = litellm.completion(model=f"{provider}/smollm2", api_base=f"{url}/v1", **options)
    text = whole.choices[0].message.content
    assert "Paris" in text, text
    assert whole.usage.completion_tokens > 0
    stream = litellm.completion(model=f"{provider}/smollm2", api_base=f"{url}/v1", stream=True, **options)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == text, (streamed, text)
anthropic = litellm.completion(model="anthropic/smollm2", api_base=url, **options)
assert anthropic.choices[0].message.content == text
ollama = litellm.completion(model="ollama_chat/smollm2", api_base=url, **options)
assert ollama.choices[0].message.content == text
prompt = litellm.text_completion(
    model="text-completion-openai/smollm2",
    prompt="The capital of France is",
    api_base=f"{url}/v1",
    max_tokens=5,
    temperature=0,
    api_key="none",
)
assert "Paris" in prompt.choices[0].text
print("passed")
