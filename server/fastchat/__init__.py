"""FastChat's worker API over the engine: what its controller, its OpenAI front and its arena talk to."""
