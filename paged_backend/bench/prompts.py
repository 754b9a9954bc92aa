"""Short questions that a small chat model can answer."""

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Why is the sky blue?",
    "Name three fruits that are red.",
    "How do I boil an egg?",
    "Explain what a computer program is to a child.",
    "Give me a short recipe for pancakes.",
    "What is photosynthesis?",
    "Write a two-sentence story about a dragon who is afraid of fire.",
    "What are the primary colours?",
    "How many days are there in a leap year, and why?",
    "Suggest a name for a friendly robot and say why it fits.",
    "What causes the tides?",
    "Write a polite email to ask for a day off.",
    "What is the difference between a list and a tuple in Python?",
    "Give three tips for sleeping better.",
)
