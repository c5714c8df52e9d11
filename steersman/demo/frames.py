"""The sentence frames that every story can use, by the part of the story they stand in.

Frame notation: see `steersman.demo.concepts`.
"""

OPENINGS = (
    "At {time}, {name} {move} to the {place}.",
    "Once there was a {size} {child} named {name} who lived near the {place}.",
    "One day at {time}, {name} {move} all the way to the {place}.",
    "This is the story of {name}, a {size} {child} from the {place}.",
    "It was almost {time} when {name} {move} down to the {place}.",
    "There once was a {child} named {name}, and {s} {move} to the {place} every day.",
    "Near the {place} lived {name}, a {child} with a {colour} cap.",
    "Once a {child} named {name} in a {colour} shirt {move} to the {place}.",
    "At the {place} a {child} named {name} {speech} hello.",
    "It was {time}, and near the {place} {name} {speech} hello.",
)
"""The first sentence: always names the child and the place, and something of `ASIDES`."""

ASIDES = ("time", "size", "colour", "move", "speech")
"""The groups of an opening that its next sentence can dwell on."""

INTRODUCTIONS: dict[str, tuple[str, ...]] = {
    "weather": (
        "Soon the {weather} came over the {place}.",
        "Suddenly the {weather} began.",
        "Nobody had told {name!} about the {weather}.",
        "That day the {weather} was very strong.",
    ),
    "place": (
        "{S} knew every corner of the {place}.",
        "{name!} loved the {place} more than any other.",
        "The {place} was quiet and the {place} was empty.",
        "{name!} {move} around the {place} twice.",
    ),
    "feeling": (
        "{name!} felt very {feeling}.",
        "All of this made {o} {feeling}.",
        "Deep inside, {s} was {feeling}.",
        "{name!} was {feeling} and could not say why.",
    ),
    "animal": (
        "There {s} met a {size} {animal}.",
        "Then a {colour} {animal} came by.",
        "A {size} {animal} was waiting for {o} there.",
        "{name!} saw a {colour} {animal} and {move} closer.",
    ),
    "food": (
        "In {p} bag {name!} had some {food}.",
        "{name!} was hungry and wished for {food}.",
        "Someone had left a lot of {food} there.",
        "It was time for {food} and {food}.",
    ),
    "thing": (
        "{name!} found a {colour} {thing} in the grass.",
        "Under a stone lay a {size} {thing}.",
        "Next to the door {s} saw a {thing}.",
        "{name!} had always wanted a {colour} {thing}.",
    ),
    "family": (
        "{P} {family} came along too.",
        "Just then {p} {family} {speech} from far away.",
        "{name!} went to look for {p} {family}.",
        "{P} {family} had told {o} to be careful.",
    ),
    "helper": (
        "On the road stood a {helper} in a {colour} cloak.",
        "A {helper} {move} out of the {place}.",
        "{name!} asked a {size} {helper} for help.",
        "Then a {helper} knocked at the door.",
    ),
}
"""The groups a story can bring in after its opening, with the sentences that bring them in."""

RECALLS: dict[str, tuple[str, ...]] = {
    "weather": (
        "All that time the {weather} went on.",
        "By then the {weather} was almost gone.",
        "{S} would never forget the {weather}.",
    ),
    "place": (
        "The {place} looked the same as ever.",
        '"I will come back to the {place}," {name!} {speech}.',
        "{S} looked back at the {place} once more.",
    ),
    "feeling": (
        "{S} still felt {feeling}.",
        '"I am so {feeling}," {name!} {speech}.',
        "Now everyone was as {feeling} as {name!}.",
    ),
    "animal": (
        "The {animal!} stayed with {o} all day.",
        "Far away another {animal} could be heard.",
        "{name!} waved to the {animal!} and {move} on.",
    ),
    "food": (
        "There was still some {food} left.",
        "{name!} shared the {food} with everyone.",
        "All {s} could think of was {food}.",
    ),
    "thing": (
        "{name!} {move} home to show the {thing!}.",
        "{S} put it next to {p} other {thing}.",
        '"I will keep this {thing!}," {name!} {speech}.',
    ),
    "family": (
        "{P} {family!} was very proud.",
        "{P} {family} {move} over to hear it all.",
        '"Well done," {p} {family!} {speech}.',
    ),
    "helper": (
        "{name!} thanked the {helper!}.",
        "Another {helper} heard of it and {move} over.",
        '"Good luck," the {helper!} {speech}.',
    ),
}
"""Later sentences that come back to a group the story has already brought in."""

ENDINGS = (
    "At {time}, {name!} {move} home.",
    "And so {name!} left the {place} and slept well.",
    "That was the best day {s} ever had at the {place}.",
    '"What a day," {name!} {speech}, and {s} {move} home.',
    "In the end {s} {move} back to the {place}.",
    "Then it was {time}, and the story was over.",
)
"""The last sentence."""

PRONOUNS: dict[str, tuple[str, str]] = {
    "S": ("She", "He"),
    "s": ("she", "he"),
    "o": ("her", "him"),
    "P": ("Her", "His"),
    "p": ("her", "his"),
    "child": ("girl", "boy"),
}
"""Frame notation -> its text for girl names and for boy names."""
