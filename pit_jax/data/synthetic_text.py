"""The words of the synthetic task: topics, word bank, tasks, phrasings of requirements, clauses of reflections.

Everything is drawn from a few hundred words, so that a vocabulary of 2,048 pieces holds each of them whole and a small
model spends its minutes on following instructions, not on spelling. Bank words are words that a requirement can ask
for; they appear in no sentence by themselves, so that an answer has one only by being asked or as a distractor.
"""

import re


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BANK = _words("gold silver paper cotton sugar lemon apple music magic hope peace summer river castle tiger rose")
"""Words that `contains`, `avoids`, `starts_with`, `ends_with` and hashtags ask for."""

TOPICS = (
    *_words("coffee tea pizza yoga chess hiking robots books games"),
    *("tea party", "pizza party", "game night", "pizza night", "chess club", "book club"),
)
"""What an answer is about. Two-word topics share their halves, so that half of one can be another's."""

JSON_KEYS = ("text", "title", "line", "answer", "body", "result")

TASKS = {
    "tagline": ("a tagline", "our {t} is for you|{t} for all|the best {t} in town"),
    "slogan": ("a slogan", "choose {t}|live for {t}|more {t} for all"),
    "tweet": ("a tweet", "we love {t}|so happy about {t}|this {t} is great"),
    "greeting": ("a greeting", "hello from our {t}|welcome to {t}|hello {t} friends"),
    "headline": ("a headline", "new {t} in town|{t} is back|big news about {t}"),
    "invitation": ("an invitation", "join us for {t}|come to {t}|come to our {t} with us"),
    "thank-you": ("a thank-you note", "thank you for {t}|thank you for the great {t}|we thank you for {t}"),
    "reminder": ("a reminder", "remember {t}|remember your {t}|it is time for {t}"),
    "review": ("a review", "great {t}|this {t} is the best|i like this {t}"),
    "advertisement": ("an advertisement", "get your {t} here|try our new {t}|buy {t} here"),
    "poster": ("a poster", "see {t} with us|come and see our {t}|big {t} day"),
    "message": ("a text message", "see you at {t}|call me about {t}|are you here for {t}"),
}
"""name -> (how a prompt calls it, sentences with the topic as {t})."""
TASKS = {name: (called, tuple(cores.split("|"))) for name, (called, cores) in TASKS.items()}

SENTENCES = (
    *("come and see", "you will love it", "we are happy", "life is good", "have a great day", "bring your friends"),
    *("it is great", "we love it", "call us", "have fun"),
)
"""Further sentences, without the topic."""

ITEM_CORES = ("our {t}", "more {t}", "the best {t}", "new {t}", "great {t}", "see {t}")
ITEMS = ("have fun", "bring friends", "be happy", "a good day", "new friends", "good news", "more fun", "come with us")
"""Items of a list, with and without the topic."""

TAILS = {
    1: ("today", "now", "here", "again"),
    2: ("every day", "right now", "this week", "at home"),
    3: ("all year long", "in your home", "for the family", "time and again"),
}
"""length in words -> endings that fit any sentence."""
WORD_TAILS = ("with {w}", "and {w}", "with more {w}", "like {w}")
"""Endings that carry a bank word."""
STARTERS = ("time:", "news:", "day:")
"""What follows a word that has to come first."""

_HELD_OUT = 2  # the last phrasings of each kind are for the test set only

PHRASINGS = {
    "topic": (
        *("Write {a} that mentions {v}.", "Write {a} about {v} and mention it.", "Mention {v} in {a}."),
        *("Give me {a} that mentions {v}.", "I need {a} that mentions {v}."),
        *("Please write {a} and mention {v}.", "We need {a} with a mention of {v}."),
        *("Make {a} which must mention {v}.", "You should write {a} that mentions {v}."),
        *("Write {a} for us and mention {v}.", "Let {a} mention {v}."),
        *("Can you write {a} that mentions {v}?", "Help me write {a} about {v} that mentions it."),
        *("Mention {v} when you write {a}.",),
        *(
            "Please give me {a} that should mention {v}.",
            "Write me {a} and please mention {v}.",
        ),
    ),
    "contains": (
        *("Include the word {v}.", "Use the word {v}.", "It must contain the word {v}."),
        *("The word {v} must appear.", "Put the word {v} in it.", "The answer should include the word {v}."),
        *("Make use of the word {v}.", "Let the word {v} appear.", "Make sure to use the word {v}."),
        *("Have the word {v} in the text.", "The answer must use the word {v}."),
        *("Find a place for the word {v}.", "Work the word {v} into it."),
        *("Please include the word {v}.", "The text must contain the word {v}."),
    ),
    "avoids": (
        *("Do not use the word {v}.", "Avoid the word {v}.", "The word {v} must not appear."),
        *("Leave out the word {v}.", "Write it without the word {v}.", "It must not contain the word {v}."),
        *("Stay away from the word {v}.", "Make sure to avoid the word {v}."),
        *("The text must not use the word {v}.", "Never use the word {v}."),
        *("It should not include the word {v}.", "Do not let the word {v} appear."),
        *("The answer should avoid the word {v}.", "Please do not include the word {v}."),
    ),
    "starts_with": (
        *("Start with the word {v}.", "Begin with the word {v}.", "The first word must be {v}."),
        *("It should start with the word {v}.", "Make {v} the first word.", "Put {v} as the first word."),
        *("Let {v} be the first word.", "Have {v} as the first word."),
        *("The text must begin with the word {v}.", "Make sure to start with the word {v}."),
        *("The answer should have {v} first.", "Open with the word {v}.", "Use the word {v} to begin."),
        *("The answer should begin with the word {v}.", "Use {v} as the first word."),
    ),
    "ends_with": (
        *("End with the word {v}.", "The last word must be {v}.", "It should end with the word {v}."),
        *("Make {v} the last word.", "Finish with the word {v}.", "Put {v} as the last word."),
        *("Let {v} be the last word.", "Have {v} as the last word.", "The text must end with the word {v}."),
        *("Make sure to finish with the word {v}.", "The answer should have {v} last."),
        *("Close with the word {v}.", "Use the word {v} to finish."),
        *("The answer should finish with the word {v}.", "Use {v} as the last word."),
    ),
    "hashtag": (
        *("Add the hashtag #{v}.", "Include the hashtag #{v}.", "Use the hashtag #{v}."),
        *("It must have the hashtag #{v}.", "Put the hashtag #{v} in it.", "The hashtag #{v} must appear."),
        *("Have the hashtag #{v} in it.", "The answer must use the hashtag #{v}."),
        *("Let the hashtag #{v} appear.", "Make sure to add the hashtag #{v}.", "Tag it with #{v}."),
        *("The text should have the hashtag #{v}.",),
        *("The answer should include the hashtag #{v}.", "Please add the hashtag #{v}."),
    ),
    "hashtags": (
        *("Use exactly {v} hashtags.", "Add exactly {v} hashtags.", "It must have exactly {v} hashtags."),
        *("Include {v} hashtags.", "Put {v} hashtags in it.", "Write {v} hashtags in the answer."),
        *("Let it have {v} hashtags.", "The text must include {v} hashtags."),
        *("Make sure to add {v} hashtags.", "Have exactly {v} hashtags.", "Tag it with {v} hashtags."),
        *("Please use {v} hashtags.",),
        *("The answer should have {v} hashtags.", "Please add {v} hashtags."),
    ),
    "upper_case": (
        *("Use only upper case letters.", "Write it in upper case.", "All letters must be upper case."),
        *("Write everything in capital letters.", "Use capital letters only.", "It should be in upper case."),
        *("Let all letters be upper case.", "The answer must use capital letters."),
        *("Have everything in upper case.", "Make all of it upper case."),
        *("Please write it in capital letters.", "The text should be in upper case."),
        *("Put all of it in upper case.", "The text must be in capital letters."),
    ),
    "lower_case": (
        *("Use only lower case letters.", "Write it in lower case.", "All letters must be lower case."),
        *("Write everything in small letters.", "Use small letters only.", "It should be in lower case."),
        *("Let all letters be lower case.", "The answer must use small letters."),
        *("Have everything in lower case.", "Make all of it lower case."),
        *("Please write it in small letters.", "The text should be in lower case."),
        *("Put all of it in lower case.", "The text must be in small letters."),
    ),
    "html_bold": (
        *("Put a part in HTML bold.", "Use HTML tags for bold.", "Make a part bold with HTML."),
        *("The answer should have an HTML bold part.", "It must have HTML bold text."),
        *("Use HTML to make words bold.", "Have a part in HTML bold.", "Please make a part bold with HTML."),
        *("The text must have HTML bold.", "Add HTML tags for bold text.", "Let a part be bold in HTML."),
        *("Write words in HTML bold.",),
        *("Please add HTML bold text.", "A part must be in HTML bold."),
    ),
    "html_italic": (
        *("Put a part in HTML italics.", "Use HTML tags for italics.", "Make a part italic with HTML."),
        *("The answer should have an HTML italic part.", "It must have HTML italic text."),
        *("Use HTML to make words italic.", "Have a part in HTML italics."),
        *("Please make a part italic with HTML.", "The text must have HTML italics."),
        *("Add HTML tags for italic text.", "Let a part be italic in HTML.", "Write words in HTML italics."),
        *("Please add HTML italic text.", "A part must be in HTML italics."),
    ),
    "html_paragraph": (
        *("Put it in an HTML paragraph.", "Use an HTML paragraph.", "Make it an HTML paragraph."),
        *("The answer should be an HTML paragraph.", "Write it as an HTML paragraph."),
        *("It must be an HTML paragraph.", "Have all of it in an HTML paragraph."),
        *("The text must be an HTML paragraph.", "Add HTML tags for a paragraph."),
        *("Please write an HTML paragraph.", "Let it be an HTML paragraph."),
        *("Use HTML paragraph tags around it.",),
        *("All of it must be in an HTML paragraph.", "Please use HTML paragraph tags."),
    ),
    "markdown_bold": (
        *("Put a part in Markdown bold.", "Use Markdown bold.", "Make a part bold with Markdown."),
        *("The answer should have a Markdown bold part.", "It must have Markdown bold text."),
        *("Use Markdown to make words bold.", "Have a part in Markdown bold."),
        *("Please make a part bold with Markdown.", "The text must have Markdown bold."),
        *("Add Markdown for bold text.", "Let a part be bold in Markdown.", "Write words in Markdown bold."),
        *("Please add Markdown bold text.", "A part must be in Markdown bold."),
    ),
    "markdown_heading": (
        *("Make it a Markdown heading.", "Use a Markdown heading.", "Write it as a Markdown heading."),
        *("It must be a Markdown heading.", "The answer should be a Markdown heading."),
        *("Put it in a Markdown heading.", "Have it as a Markdown heading."),
        *("The text must be a Markdown heading.", "Please make it a Markdown heading."),
        *("Let it be a Markdown heading.", "Write a Markdown heading."),
        *("It should start as a Markdown heading.",),
        *("Start as a Markdown heading.", "Please use a Markdown heading."),
    ),
    "quotes": (
        *("Put it in double quotes.", "Use double quotes around it.", "Put double quotes around the answer."),
        *("Write it in double quotes.", "All of it must be in double quotes."),
        *("The text should be in double quotes.", "Have it in double quotes."),
        *("It must have double quotes around it.", "The text must be in double quotes."),
        *("Please use double quotes.", "Let it be in double quotes.", "Add double quotes around all of it."),
        *("The answer must be in double quotes.", "Please put double quotes around it."),
    ),
    "json": (
        *('Write it as JSON with the key "{v}".', 'Use JSON with the key "{v}".'),
        *('Make it JSON with the key "{v}".', 'The answer must be JSON with the key "{v}".'),
        *('It should be JSON with the key "{v}".', 'Give me JSON with the key "{v}".'),
        *('Put it in JSON with the key "{v}".', 'Have it in JSON with the key "{v}".'),
        *('The text should be JSON and use the key "{v}".', 'Please write JSON with the key "{v}".'),
        *('Let it be JSON with the key "{v}".', 'Use the key "{v}" in JSON.'),
        *('It must be in JSON with the key "{v}".',),
        *(
            'Please use JSON and the key "{v}".',
            'The text must be in JSON with the key "{v}".',
        ),
    ),
    "parentheses": (
        *("Put a part in parentheses.", "Use parentheses for a part.", "It must have a part in parentheses."),
        *("Include words in parentheses.", "Write a part in parentheses.", "Add a part in parentheses."),
        *("Have a part in parentheses.", "The text must have words in parentheses."),
        *("Please put a part in parentheses.", "Let a part be in parentheses."),
        *("Put parentheses around a part.", "Make sure to use parentheses."),
        *("A part must be in parentheses.", "The answer should have words in parentheses."),
    ),
    "exactly_words": (
        *("Use exactly {v} words.", "Write exactly {v} words.", "It must have exactly {v} words."),
        *("It should be {v} words long.", "Make it exactly {v} words long.", "Give me exactly {v} words."),
        *("Have exactly {v} words.", "The text must be exactly {v} words long."),
        *("Please write exactly {v} words.", "Let it be {v} words long."),
        *("The answer should be {v} words long.", "Make sure to use exactly {v} words."),
        *("The answer must have exactly {v} words.", "Make it {v} words long."),
    ),
    "at_most_words": (
        *("Use at most {v} words.", "Write at most {v} words.", "Use no more than {v} words."),
        *("It should have at most {v} words.", "It must not have more than {v} words."),
        *("Give me at most {v} words.", "Have at most {v} words."),
        *("The text must be at most {v} words long.", "Please write at most {v} words."),
        *("Let it be at most {v} words long.", "The answer should have no more than {v} words."),
        *("Make sure to use no more than {v} words.",),
        *("The answer must have at most {v} words.", "Write no more than {v} words."),
    ),
    "sentences": (
        *("Use exactly {v} sentences.", "Write exactly {v} sentences."),
        *("It must have exactly {v} sentences.", "It should be {v} sentences long."),
        *("Write it in {v} sentences.", "Give me exactly {v} sentences.", "Have exactly {v} sentences."),
        *("The text must be {v} sentences long.", "Please write {v} sentences."),
        *("Let it be {v} sentences long.", "The answer should have exactly {v} sentences."),
        *("Make sure to write {v} sentences.",),
        *("The answer must have {v} sentences.", "Make it {v} sentences long."),
    ),
    "bullets": (
        *("Use exactly {v} bullet points.", "Write {v} bullet points.", "Make it {v} bullet points."),
        *("It must have {v} bullet points.", "Write it as {v} bullet points.", "Give me {v} bullet points."),
        *("Have {v} bullet points.", "The text must be {v} bullet points.", "Please use {v} bullet points."),
        *("Let it be {v} bullet points.", "The answer should have exactly {v} bullet points."),
        *("Make sure to write {v} bullet points.",),
        *("The answer must have {v} bullet points.", "It should be {v} bullet points."),
    ),
    "numbered": (
        *("Write a numbered list of {v}.", "Use a numbered list of {v}.", "Make it a numbered list of {v}."),
        *("It must be a numbered list of {v}.", "Write it as a numbered list of {v}."),
        *("Give me a numbered list of {v}.", "Have a numbered list of {v}."),
        *("The text must be a numbered list of {v}.", "Please write a numbered list of {v}."),
        *("Let it be a numbered list of {v}.", "The answer should be in a numbered list of {v}."),
        *("Make sure to use a numbered list of {v}.",),
        *("The answer must be a numbered list of {v}.", "Put it in a numbered list of {v}."),
    ),
    "exclamation": (
        *("End with an exclamation mark.", "It must end with an exclamation mark."),
        *("Finish with an exclamation mark.", "Put an exclamation mark last."),
        *("The last mark must be an exclamation mark.", "Use an exclamation mark as the last mark."),
        *("Have an exclamation mark last.", "The text must end with an exclamation mark."),
        *("Please put an exclamation mark last.", "Let the last mark be an exclamation mark."),
        *("Close with an exclamation mark.", "The answer must finish with an exclamation mark."),
        *(
            "The answer should end with an exclamation mark.",
            "Please finish with an exclamation mark.",
        ),
    ),
    "question": (
        *("End with a question mark.", "It must end with a question mark.", "Finish with a question mark."),
        *("Put a question mark last.", "The last mark must be a question mark."),
        *("Use a question mark as the last mark.", "Have a question mark last."),
        *("The text must end with a question mark.", "Please put a question mark last."),
        *("Let the last mark be a question mark.", "Close with a question mark."),
        *("The answer must finish with a question mark.",),
        *(
            "The answer should end with a question mark.",
            "Please finish with a question mark.",
        ),
    ),
    "postscript": (
        *("Add a P.S. line.", "Include a P.S. line.", "It must have a P.S. line.", "Put a P.S. line last."),
        *("Write a P.S. line too.", "Finish with a P.S. line.", "Have a P.S. line last."),
        *("The text must end with a P.S. line.", "Please include a P.S. line.", "Let it have a P.S. line."),
        *("Close with a P.S. line.", "The answer must have a P.S. line."),
        *("The answer should have a P.S. line.", "Please add a P.S. line."),
    ),
    "no_commas": (
        *("Do not use commas.", "Use no commas.", "Write it without commas.", "Avoid commas."),
        *("It must not contain commas.", "Leave out all commas.", "Have no commas in it."),
        *("The text must not use commas.", "Please avoid commas.", "Let it have no commas."),
        *("Stay away from commas.", "Never use commas."),
        *("The answer should have no commas.", "Please do not use commas."),
    ),
}
"""kind -> ways to ask for it; {v} is the value, {a} the task with its article."""


def phrasings(kind: str, which: str) -> tuple[str, ...]:
    """Ways to ask for a requirement.

    Args:
      kind: a key of PHRASINGS.
      which: "train" or "test"; the two share nothing.

    Raises:
      ValueError: for another `which`.
    """
    if which == "train":
        return PHRASINGS[kind][:-_HELD_OUT]
    if which == "test":
        return PHRASINGS[kind][-_HELD_OUT:]
    raise ValueError(f"phrasings is {which!r}: use train or test")


CLAUSES = {
    "topic": "topic {v}",
    "contains": "word {v}",
    "avoids": "no {v}",
    "starts_with": "first {v}",
    "ends_with": "last {v}",
    "hashtag": "#{v}",
    "hashtags": "{v} hashtags",
    "upper_case": "upper case",
    "lower_case": "lower case",
    "html_bold": "HTML bold",
    "html_italic": "HTML italics",
    "html_paragraph": "HTML paragraph",
    "markdown_bold": "Markdown bold",
    "markdown_heading": "Markdown heading",
    "quotes": "double quotes",
    "json": 'JSON "{v}"',
    "parentheses": "parentheses",
    "exactly_words": "exactly {v} words",
    "at_most_words": "at most {v} words",
    "sentences": "{v} sentences",
    "bullets": "{v} bullet points",
    "numbered": "numbered list of {v}",
    "exclamation": "exclamation mark",
    "question": "question mark",
    "postscript": "P.S. line",
    "no_commas": "no commas",
}
"""kind -> how a reflection names the requirement, before it says whether the answer meets it."""


def word_forms(*more: str) -> list[str]:
    """Each word of the task in the forms that rows use: plain, capitalised, upper case, after "#".

    Training text for a vocabulary, beside the rows. SentencePiece's unigram model takes as candidates only strings that
    occur in several distinct words, however often they occur, and would split words such as "Use" that always stand
    alone.

    Args:
      more: texts whose words are to be whole as well.
    """
    texts = [*BANK, *TOPICS, *JSON_KEYS, *STARTERS, *WORD_TAILS, *SENTENCES, *ITEM_CORES, *ITEMS]
    texts += [text for tails in TAILS.values() for text in tails]
    texts += [text for called, cores in TASKS.values() for text in (called, *cores)]
    texts += [text for wordings in PHRASINGS.values() for text in wordings]
    texts += [*CLAUSES.values(), "yes no lacks nothing HTML Markdown JSON", *more]
    forms = []
    for word in sorted({w for text in texts for w in re.findall(r"[A-Za-z]+", re.sub(r"\{.\}", " ", text))}):
        for form in dict.fromkeys((word, word.lower(), word.capitalize(), word.upper())):
            forms.append(f"{form} {form}. #{form} #{form}.")
    return forms
