"""langchain-openai against a server: invoke, stream, batch, logprobs, and the Responses API."""

import sys

from langchain_openai import ChatOpenAI, OpenAI

url = sys.argv[1]
options = {"model": "smollm2", "base_url": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 16}
question = "What is the capital of France? Answer in one word."
chat = ChatOpenAI(**options)
whole = chat.invoke([("system", "Be brief."), ("human", question)])
assert "Paris" in whole.content, whole
assert whole.usage_metadata["output_tokens"] > 0
streamed = "".join(chunk.content for chunk in chat.stream([("system", "Be brief."), ("human", question)]))
assert streamed == whole.content
assert len(chat.batch([question] * 4)) == 4
logprobs = chat.bind(logprobs=True, top_logprobs=2).invoke(question).response_metadata["logprobs"]["content"]
assert len(logprobs[0]["top_logprobs"]) == 2
responses = ChatOpenAI(**options, use_responses_api=True).invoke(question)
assert "Paris" in responses.text, responses
assert "Paris" in OpenAI(**options).invoke("The capital of France is")
print("passed")
