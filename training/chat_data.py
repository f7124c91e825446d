"""Make the chat examples: build/chat.jsonl, one conversation per line.

{"split", "thinking": bool, "tools": [...] or absent, "messages": [...]} in the form the chat template takes.
Kinds: small talk and facts, small Rust functions, functions and doc comments found in the corpus, sums and
word games, and tool calls whose tools have varying names and keys, so that the model must read the signatures.
"""

import json
import pathlib
import random
import re

import chat_facts as facts

BUILD = pathlib.Path(__file__).resolve().parent / "build"
SEED = 20261120
# Examples made of each kind.
NUM_FACTS, NUM_FUNCTIONS, NUM_SUMS, NUM_WORDS, NUM_TOOLS, NUM_MULTI_TURN = 20000, 30000, 9000, 7000, 26000, 10000
MAX_CORPUS_PAIRS = 45000


def turn(question, answer, reasoning):
    """One user turn and its answer, as messages."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "reasoning_content": reasoning},
    ]


def fact_turn(rng):
    kind = rng.random()
    if kind < 0.15:
        return turn(rng.choice(facts.GREETINGS), rng.choice(facts.GREETING_ANSWERS), "The user greets me. I greet them back.")
    if kind < 0.19:
        return turn(rng.choice(facts.THANKS), rng.choice(facts.THANKS_ANSWERS), "The user thanks me.")
    if kind < 0.22:
        return turn(rng.choice(facts.BYES), rng.choice(facts.BYE_ANSWERS), "The user says goodbye.")
    if kind < 0.27:
        name = rng.choice(facts.PEOPLE)
        question = rng.choice(["My name is {}.", "I am {}.", "Hi, I'm {}.", "Hello, my name is {}"]).format(name)
        return turn(question, f"Hello, {name}! How can I help you?", f"The user's name is {name}. I greet them by name.")
    questions, answer = rng.choice(facts.FACTS)
    question = rng.choice(questions)
    if rng.random() < 0.2:
        question = question.lower().rstrip("?.") if rng.random() < 0.5 else "Please tell me: " + question
    return turn(question, answer, f"The user asks: {question} I know this and answer directly.")


def infinitive(description):
    """'returns the sum' -> 'return the sum'."""
    verb, _, rest = description.partition(" ")
    verb = verb[:-3] + "y" if verb.endswith("ies") else verb[:-1]
    return f"{verb} {rest}"


def composed_function(rng):
    """(name, description, code, remark) of a function that filters, maps and folds a slice."""
    filter_name, condition = rng.choice(facts.FILTERS)
    map_name, mapped = rng.choice(facts.MAPS)
    fold_name, fold, result = rng.choice(facts.FOLDS)
    items = " ".join(word for word in (filter_name, "numbers") if word)
    items = f"{map_name} of the {items}" if map_name else items
    name = "_".join([fold_name.split()[-1], *(word for word in (filter_name, map_name) if word)]).replace("-", "_")
    steps = ["numbers", ".iter()", ".copied()"]
    steps += [f".filter(|n| {condition})"] if condition else []
    steps += [f".map(|n| {mapped})"] if mapped else []
    steps.append(f".{fold}()")
    body = "".join(steps) if len(steps) < 5 else steps[0] + "".join(f"\n        {step}" for step in steps[1:])
    code = f"fn {name}(numbers: &[T]) -> {result} {{\n    {body}\n}}"
    done = [f"keeps the {filter_name} numbers"] if filter_name else []
    done += [f"takes their {map_name}" if filter_name else f"takes the {map_name}"] if map_name else []
    done.append(f"calls `{fold}`")
    remark = "It " + (", ".join(done[:-1]) + " and " if len(done) > 1 else "") + done[-1] + "."
    return name, f"returns the {fold_name} of the {items} in a {rng.choice(['slice', 'slice', 'list', 'vector'])}", code, remark


def function_turn(rng):
    if rng.random() < 0.1:
        what, code = rng.choice(facts.TYPES)
        question = rng.choice(["Write {} in Rust.", "Implement {} in Rust.", "Show me {} in Rust.", "Write a Rust struct for {}.", "How do I write {} in Rust?"]).format(what)
        return turn(question, f"```rust\n{code}\n```", f"The user wants {what}. I write a struct and its methods.")
    name, description, code, remark = composed_function(rng) if rng.random() < 0.35 else rng.choice(facts.FUNCTIONS)
    integer = rng.choice(["i32", "i64"] if "negative" in description else facts.INTEGER_TYPES)
    question = rng.choice([
        "Write a function that {d}.", "Write a Rust function that {d}.", "Write a Rust function which {d}.",
        "Please write a function that {d}.", "Can you write a Rust function that {d}?", "Implement `{n}` in Rust.",
        "Write a function `{n}` that {d}.", "How do I {i} in Rust?", "I need a function that {d}.",
        "Give me a Rust function that {d}.", "rust function that {d}", "Write a Rust function to {i}.",
        "Write a function to {i} in Rust.", "Show me how to {i} in Rust.", "Create a function named {n} that {d}.",
    ]).format(d=description, n=name, i=infinitive(description))
    if re.search(r"\bT\b", code) and "<T>" not in code:
        if rng.random() < 0.3:
            question = question.rstrip(".?") + f", for {integer}."
        else:
            integer = "i32"
        code = re.sub(r"\bT\b", integer, code)
    if rng.random() < 0.3:
        code = re.sub(r"^fn ", "pub fn ", code, count=1, flags=re.M)
    answer = f"```rust\n{code}\n```"
    if rng.random() < 0.7:
        answer += f"\n\n{remark}"
    return turn(question, answer, f"The user wants a function that {description}. {remark}")


def sum_turn(rng):
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    operator = rng.choice("+++---*")
    if operator == "*":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    word = {"+": "plus", "-": "minus", "*": "times"}[operator]
    result = {"+": a + b, "-": a - b, "*": a * b}[operator]
    question = rng.choice([
        f"What is {a} {operator} {b}?", f"{a} {operator} {b} =", f"{a} {operator} {b}", f"Calculate {a} {operator} {b}.",
        f"What is {a} {word} {b}?", f"How much is {a} {word} {b}?", f"Compute {a} {operator} {b}.",
    ])
    answer = rng.choice([f"{a} {operator} {b} = {result}", f"{a} {operator} {b} = {result}", f"The answer is {result}."])
    return turn(question, answer, f"{a} {operator} {b} = {result}.")


def word_turn(rng):
    word = rng.choice(facts.WORDS)
    letters = " ".join(word)
    kind = rng.randrange(5)
    if kind == 0:
        question, answer, reasoning = f"Reverse the word {word}.", word[::-1], f"The letters are {letters}. In reverse: {' '.join(word[::-1])}."
    elif kind == 1:
        question, answer, reasoning = f"Write {word} in upper case.", word.upper(), f"The letters are {letters}."
    elif kind == 2:
        question, answer, reasoning = f"How many letters does the word {word} have?", f"The word {word} has {len(word)} letters.", f"The letters are {letters}. That is {len(word)}."
    elif kind == 3:
        question, answer, reasoning = f"Spell the word {word}.", "-".join(word), f"The letters are {letters}."
    else:
        words = rng.sample(facts.WORDS, 3)
        question, answer = f"Sort these words: {', '.join(words)}.", ", ".join(sorted(words))
        reasoning = "I compare the first letters: " + ", ".join(f"{w} starts with {w[0]}" for w in words) + "."
    return turn(question, answer, reasoning)


# Tool families: names, description, parameters (keys, description, JSON type, values), requests, result, answer.
# In a request "{0}" is the first argument; result and answer may use it too, and {r} for a random number.
TOOLS = [
    (["get_weather", "weather", "fetch_weather", "current_weather", "weather_lookup"], "Get the current weather of a city",
     [(["city", "location", "place"], "Name of the city", "string", facts.CITIES)],
     ["What is the weather in {0}?", "How is the weather in {0} today?", "Is it warm in {0}?", "Weather in {0}, please.", "Tell me the weather in {0}."],
     '{{"temperature": {r}, "sky": "{s}"}}', "In {0} it is {r} degrees and {s}."),
    (["get_time", "current_time", "clock", "time_in"], "Get the local time of a city",
     [(["city", "place", "timezone"], "Name of the city", "string", facts.CITIES)],
     ["What time is it in {0}?", "Tell me the time in {0}.", "What is the local time in {0}?"],
     "{r}:15", "It is {r}:15 in {0}."),
    (["read_file", "open_file", "cat", "file_contents"], "Read a file and return its text",
     [(["path", "file", "filename"], "Path of the file", "string", facts.FILES)],
     ["Read {0}.", "Show me {0}.", "What is in {0}?", "Open the file {0}.", "Please read the file {0}.", "Print the contents of {0}."],
     "# {s}\nline {r}", "The file {0} contains:\n\n```\n# {s}\nline {r}\n```"),
    (["list_directory", "ls", "list_files", "list_dir"], "List the files in a directory",
     [(["path", "directory", "folder"], "Path of the directory", "string", facts.FOLDERS)],
     ["List the files in {0}.", "Which files are in {0}?", "What is in the folder {0}?", "Show the directory {0}."],
     "main.rs\n{s}.rs\nlib.rs", "The folder {0} contains main.rs, {s}.rs and lib.rs."),
    (["search_web", "web_search", "search", "google"], "Search the web",
     [(["query", "q", "text"], "What to search for", "string", [f"{a} {b}" for a in ("rust", "cargo", "best", "how to use") for b in facts.WORDS])],
     ["Search the web for {0}.", "Search for {0}.", "Look up {0}.", "Find information about {0}."],
     "{r} results. First: all about {s}.", "I found {r} results. The first one is all about {s}."),
    (["calculate", "calculator", "evaluate", "compute"], "Evaluate an arithmetic expression",
     [(["expression", "formula", "input"], "The expression", "string", [f"{a} {o} {b}" for a in range(113, 999, 37) for o in "+-*" for b in range(12, 99, 7)])],
     ["What is {0}?", "Calculate {0}.", "How much is {0}?", "Compute {0} for me."],
     "{v}", "{0} = {v}"),
    (["set_timer", "start_timer", "timer"], "Start a timer",
     [(["minutes", "duration", "time"], "Length in minutes", "integer", list(range(1, 60)))],
     ["Set a timer for {0} minutes.", "Start a {0} minute timer.", "Remind me in {0} minutes."],
     "ok", "I have set a timer for {0} minutes."),
    (["run_tests", "cargo_test", "test"], "Run the tests of a crate",
     [(["package", "crate", "name"], "Name of the crate", "string", facts.WORDS)],
     ["Run the tests of {0}.", "Test the crate {0}.", "Do the tests of {0} pass?"],
     "test result: ok. {r} passed; 0 failed", "All {r} tests of {0} pass."),
    (["grep", "search_files", "find_text"], "Search files for a pattern",
     [(["pattern", "text", "query"], "What to look for", "string", facts.WORDS), (["path", "directory", "folder"], "Where to look", "string", facts.FOLDERS)],
     ["Search for {0} in {1}.", "Find {0} in the folder {1}.", "Where does {0} occur in {1}?"],
     "{1}/{s}.rs:{r}", "I found {0} in {1}/{s}.rs, line {r}."),
    (["send_email", "send_mail", "email"], "Send an email",
     [(["to", "recipient", "address"], "Who gets it", "string", facts.PEOPLE), (["subject", "title"], "Subject line", "string", facts.WORDS)],
     ["Send an email to {0} about {1}.", "Write to {0} about {1}.", "Email {0} with the subject {1}."],
     "sent", "I sent the email about {1} to {0}."),
    (["translate", "translate_text", "translation"], "Translate text",
     [(["text", "input", "word"], "What to translate", "string", facts.WORDS), (["language", "target", "to"], "Target language", "string", facts.LANGUAGES)],
     ["Translate {0} to {1}.", "What is {0} in {1}?", "How do I say {0} in {1}?"],
     "{s}", "In {1}, {0} is {s}."),
    (["convert_currency", "exchange", "currency"], "Convert an amount of money",
     [(["amount", "value"], "How much", "integer", list(range(5, 500, 5))), (["currency", "to", "target"], "Target currency", "string", ["EUR", "USD", "GBP", "JPY", "CHF"])],
     ["Convert {0} dollars to {1}.", "How much is {0} dollars in {1}?", "What are {0} dollars in {1}?"],
     "{r}", "{0} dollars are {r} {1}."),
    (["create_event", "add_event", "schedule"], "Add an event to the calendar",
     [(["title", "name"], "Name of the event", "string", ["lunch", "meeting", "dinner", "review", "call", "standup"]), (["day", "date"], "Day of the event", "string", ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "tomorrow"])],
     ["Schedule a {0} on {1}.", "Add a {0} to my calendar for {1}.", "Plan a {0} for {1}."],
     "created", "The {0} on {1} is in your calendar."),
]
SKIES = ["sunny", "cloudy", "rainy", "clear", "windy"]


class Tool:
    """One tool of a family, with its name and keys chosen."""

    def __init__(self, rng, family):
        names, self.description, parameters, self.requests, self.result, self.answer = family
        self.name = rng.choice(names)
        self.parameters = [(rng.choice(keys), text, kind, values) for keys, text, kind, values in parameters]

    def schema(self):
        properties = {key: {"type": kind, "description": text} for key, text, kind, _ in self.parameters}
        return {"type": "function", "function": {
            "name": self.name, "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)},
        }}

    def turns(self, rng):
        """User request, tool call, tool result and final answer."""
        values = [rng.choice(choices) for _, _, _, choices in self.parameters]
        fill = {"r": rng.randint(2, 30), "s": rng.choice(SKIES if "sky" in self.result else facts.WORDS)}
        if "{v}" in self.answer:
            a, operator, b = values[0].split()
            fill["v"] = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        arguments = {key: value for (key, _, _, _), value in zip(self.parameters, values)}
        shown = ", ".join(f"{key} {value}" for key, value in arguments.items())
        return [
            {"role": "user", "content": rng.choice(self.requests).format(*values)},
            {"role": "assistant", "content": "", "reasoning_content": f"I can use the tool {self.name} with {shown}.",
             "tool_calls": [{"type": "function", "function": {"name": self.name, "arguments": arguments}}]},
            {"role": "tool", "content": self.result.format(*values, **fill)},
            {"role": "assistant", "content": self.answer.format(*values, **fill), "reasoning_content": "The tool has answered."},
        ]


def tool_example(rng):
    """A conversation with one to three tools on offer; sometimes none of them is needed."""
    tools = [Tool(rng, family) for family in rng.sample(TOOLS, rng.choice([1, 1, 2, 2, 3]))]
    messages = rng.choice([fact_turn, function_turn])(rng) if rng.random() < 0.15 else rng.choice(tools).turns(rng)
    if rng.random() < 0.15:
        messages = messages + rng.choice(tools).turns(rng)
    return {"tools": [tool.schema() for tool in tools], "messages": messages}


FUNCTION = re.compile(r"((?:^ *///[^\n]*\n)+)((?: *#\[[^\n]*\]\n)*)( *)(pub(?:\([a-z]+\))? )?((?:const |async |unsafe )*fn (\w+)[^\n;{]*\{\n(?:.*?\n)??\3\}\n)", re.M | re.S)


def corpus_pairs(text):
    """(name, doc sentence, code) of the short documented functions of a Rust file."""
    for match in FUNCTION.finditer(text):
        indent, code, name = match[3], (match[4] or "") + match[5], match[6]
        doc = " ".join(line.strip()[3:].strip() for line in match[1].strip().split("\n"))
        sentence = re.split(r"(?<=[.!])\s|\s#|```", doc)[0].strip().rstrip(".")
        if not 15 < len(sentence) < 160 or not 40 < len(code) < 600 or code.count("\n") > 18 or "///" in code:
            continue
        code = "\n".join(line.removeprefix(indent) for line in code.rstrip().split("\n"))
        yield name, sentence, code


def corpus_examples(rng):
    """Requests for, and explanations of, functions of the corpus, each with its file's split."""
    examples = []
    with open(BUILD / "corpus.jsonl") as corpus:
        for line in corpus:
            record = json.loads(line)
            if record["path"].endswith(".rs"):
                pairs = list(corpus_pairs(record["text"]))
                examples += [(record["split"], *pair) for pair in rng.sample(pairs, min(len(pairs), 12))]
    rng.shuffle(examples)
    for split, name, sentence, code in examples[:MAX_CORPUS_PAIRS]:
        lowered = sentence[0].lower() + sentence[1:]
        if rng.random() < 0.75:
            method = "method" if "self" in code.split("{")[0] else "function"
            question = rng.choice([
                f"Write a Rust {method} `{name}` that {lowered}.", f"Implement `{name}` in Rust: {lowered}.",
                f"Write the {method} `{name}`. {sentence}.", f"Write a Rust {method}: {lowered}.",
            ])
            messages = turn(question, f"```rust\n{code}\n```", f"The user wants a {method} `{name}`: {lowered}.")
        else:
            question = rng.choice(["What does this function do?", "Explain this code.", "Write a doc comment for this function.", "Describe this Rust function."])
            messages = turn(f"{question}\n\n```rust\n{code}\n```", f"`{name}`: {lowered}.", f"The function is called {name}.")
        yield {"split": split, "messages": messages}


def finish(rng, example):
    """Choose split, thinking and a system prompt."""
    example.setdefault("split", "heldout" if rng.random() < 0.01 else "train")
    # The template empties the reasoning of earlier turns, so long thinking conversations would teach not to think.
    num_users = sum(message["role"] == "user" for message in example["messages"])
    example["thinking"] = rng.random() < (0.5 if num_users == 1 else 0.2)
    example["reasoning_effort"] = "high" if rng.random() < 0.2 else "max"
    if rng.random() < 0.2:
        example["messages"] = [{"role": "system", "content": rng.choice(facts.SYSTEM_PROMPTS)}] + example["messages"]
    return example


def main():
    rng = random.Random(SEED)
    examples = []
    for make, count in ((fact_turn, NUM_FACTS), (function_turn, NUM_FUNCTIONS), (sum_turn, NUM_SUMS), (word_turn, NUM_WORDS)):
        examples += [{"messages": make(rng)} for _ in range(count)]
    for _ in range(NUM_MULTI_TURN):
        makers = rng.choices([fact_turn, function_turn, sum_turn, word_turn], k=rng.randint(2, 4))
        examples.append({"messages": [message for make in makers for message in make(rng)]})
    examples += [tool_example(rng) for _ in range(NUM_TOOLS)]
    examples += corpus_examples(rng)
    rng.shuffle(examples)
    with open(BUILD / "chat.jsonl", "w") as out:
        for example in examples:
            json.dump(finish(rng, example), out)
            out.write("\n")
    print(len(examples), "conversations")


if __name__ == "__main__":
    main()
