"""The concepts of the story grammar: their words, and the sentences that only they can bring.

A group is a role that a story fills with ONE of its concepts (the weather of this story is snow); a mention of the
group then takes any word of that concept. The words of a concept are interchangeable: they share their grammatical
form with the whole group, start with a consonant where an article can come before them, and belong to no other
concept and to no sentence frame. That makes a word's concept readable from the word alone, and the labels exact.

Frame notation: `{weather}` is a fresh word of the story's weather concept, `{animal!}` repeats the last word of the
group, and `{S} {s} {o} {P} {p} {child}` are She/he, she/he, her/him, Her/His, her/his and girl/boy.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One labelled concept."""

    name: str
    """The label, e.g. `snow`."""
    group: str
    """The role in a story that the concept can fill, e.g. `weather`."""
    words: tuple[str, ...]
    """The interchangeable words; a mention draws one of them uniformly."""
    frames: tuple[str, ...]
    """Sentences that can follow a mention of the group in stories with this concept, and in no others."""


def _concept(group: str, name: str, words: str, *frames: str) -> Concept:
    return Concept(name=name, group=group, words=tuple(words.split()), frames=frames)


_ALL = (
    # name: who the story is about
    _concept("name", "girl_names", "Anna Mia Lucy Emma Nora Ella Sara Ruby"),
    _concept("name", "boy_names", "Tom Ben Max Sam Leo Jack Finn Noah"),
    # time: "at ..."
    _concept(
        "time",
        "early",
        "dawn sunrise daybreak breakfast",
        "The rooster crows at {time}.",
        "At {time} the grass was full of dew.",
        "Few are awake at {time}, but {name!} was.",
    ),
    _concept(
        "time",
        "midday",
        "noon midday lunchtime teatime",
        "The bell rings at {time}.",
        "At {time} there was no shadow at all.",
        "Most are hungry at {time}, and so was {name!}.",
    ),
    _concept(
        "time",
        "late",
        "dusk sunset nightfall twilight bedtime",
        "The owls wake up at {time}.",
        "At {time} the first lamp was lit.",
        "Stars come out at {time}, and {name!} loved stars.",
    ),
    # size and colour: before a noun
    _concept(
        "size",
        "big",
        "big huge large massive mighty",
        "A {size} child needs a long bed.",
        "{name!} was so {size} that every chair broke.",
        "Nobody so {size} can hide.",
    ),
    _concept(
        "size",
        "small",
        "small tiny little wee miniature",
        "A {size} child fits in a basket.",
        "{name!} was so {size} that a spoon would do as a bed.",
        "Nobody so {size} can reach a shelf.",
    ),
    _concept(
        "colour",
        "warm_colours",
        "red yellow pink scarlet golden",
        "{name!} liked {colour} because fire is {colour}.",
        "The evening sky has a {colour} shine.",
        "With {colour} paint {s} drew a flame.",
    ),
    _concept(
        "colour",
        "cool_colours",
        "blue green purple turquoise teal",
        "{name!} liked {colour} because the sea is {colour}.",
        "The far hills have a {colour} shine.",
        "With {colour} paint {s} drew a wave.",
    ),
    _concept(
        "colour",
        "plain_colours",
        "black white grey brown beige",
        "{name!} liked {colour} because stones are {colour}.",
        "An old wall has a {colour} shine.",
        "With {colour} paint {s} drew a wall.",
    ),
    # move and speech: verbs in the past
    _concept(
        "move",
        "fast_moves",
        "ran raced dashed rushed hurried",
        "{name!} {move} like an arrow.",
        "{S} {move} until {s} was out of breath.",
        "{S} always {move}, for {s} hated to be late.",
    ),
    _concept(
        "move",
        "slow_moves",
        "walked strolled wandered crept plodded",
        "{name!} {move} like a snail.",
        "{S} {move} and looked at everything.",
        "{S} always {move}, for there was no hurry.",
    ),
    _concept(
        "move",
        "jumping",
        "hopped skipped bounced leaped danced",
        "{name!} {move} like a frog.",
        "{S} {move} over one stone after the other.",
        "{S} always {move}, for {s} had springs for legs.",
    ),
    _concept(
        "speech",
        "loud_speech",
        "shouted yelled called roared bellowed",
        "{name!} {speech} like a foghorn.",
        "Whenever {s} {speech}, the windows rattled.",
        "{S} {speech} so that the whole land could hear.",
    ),
    _concept(
        "speech",
        "quiet_speech",
        "whispered murmured muttered mumbled sighed",
        "{name!} {speech} like a mouse.",
        "Whenever {s} {speech}, people had to lean in.",
        "{S} {speech} so that it stayed a secret.",
    ),
    _concept(
        "speech",
        "merry_speech",
        "laughed giggled chuckled joked",
        "{name!} {speech} like a clown.",
        "Whenever {s} {speech}, others had to join in.",
        "{S} {speech} until {p} belly hurt.",
    ),
    # weather: "the ..."
    _concept(
        "weather",
        "rain",
        "rain drizzle downpour shower cloudburst",
        "The {weather} drummed on every roof.",
        "Wet shoes were no fun, but the {weather} did not care.",
        "{name!} {move} through the {weather} with an umbrella.",
    ),
    _concept(
        "weather",
        "snow",
        "snow frost ice sleet blizzard",
        "{name!} made cold footprints in the {weather}.",
        "{P} nose was cold from the {weather}.",
        "The {weather} sparkled on every branch.",
    ),
    _concept(
        "weather",
        "sunshine",
        "sunshine sunlight warmth heat daylight",
        "The {weather} made the stones warm.",
        "{name!} sat in the shade to hide from the {weather}.",
        "Every window was bright with {weather}.",
    ),
    _concept(
        "weather",
        "wind",
        "wind breeze gale gust whirlwind",
        "The {weather} pulled at {p} hair, and {name!} {move} on.",
        "Leaves flew up in the {weather}.",
        "A gate banged in the {weather}.",
    ),
    _concept(
        "weather",
        "storm",
        "storm thunder lightning tempest thunderstorm",
        "The sky shook with the {weather}.",
        "{name!} counted to ten after the {weather}.",
        "{S} hid under a blanket until the {weather} was over.",
    ),
    _concept(
        "weather",
        "fog",
        "fog mist haze murk smoke",
        "{name!} could not see {p} own hand in the {weather}.",
        "Every path was lost in the {weather}.",
        "Only a lamp could be seen through the {weather}.",
    ),
    # place: "the ..."
    _concept(
        "place",
        "seaside",
        "beach shore seaside harbour bay",
        "The waves rolled in at the {place}.",
        "There was salt in the air of the {place}.",
        "{name!} wrote a word in the sand of the {place}.",
    ),
    _concept(
        "place",
        "woods",
        "forest woods grove thicket glade",
        "Old trees stood close together in the {place}.",
        "{name!} {move} over the moss of the {place}.",
        "Leaves covered the ground of the {place}.",
    ),
    _concept(
        "place",
        "farm",
        "barn farm meadow orchard pasture",
        "Hay was piled high at the {place}.",
        "A {size} fence went around the {place}.",
        "{name!} smelled the hay of the {place}.",
    ),
    _concept(
        "place",
        "town",
        "market village street bakery library",
        "{name!} talked with the people near the {place}.",
        "The clock above the {place} rang six times.",
        "There were lamps and people all over the {place}.",
    ),
    _concept(
        "place",
        "mountains",
        "mountain hilltop cliff ridge summit",
        "From the {place} {name!} could see the whole world.",
        "The climb up to the {place} was steep.",
        "An echo came back from the {place}.",
    ),
    _concept(
        "place",
        "waters",
        "river pond lake stream brook",
        "{name!} threw a {size} stone into the {place}.",
        "Reeds grew along the {place}.",
        "{S} put {p} feet into the {place}.",
    ),
    _concept(
        "place",
        "home",
        "kitchen attic bedroom cellar hallway",
        "A clock ticked on the wall of the {place}.",
        "There was dust on the floor of the {place}.",
        "{name!} closed the {colour} curtains of the {place}.",
    ),
    # feeling: "felt ..."
    _concept(
        "feeling",
        "happy",
        "happy glad cheerful merry joyful delighted",
        "Being {feeling}, {s} sang a song.",
        "A smile is easy for a {feeling} child.",
        "{name!} clapped {p} hands, for {s} was {feeling}.",
    ),
    _concept(
        "feeling",
        "sad",
        "sad gloomy unhappy lonely tearful miserable",
        "A tear fell, and {s} was {feeling} for an hour.",
        "{name!} looked at the ground with a {feeling} face.",
        "Being {feeling}, {s} needed a hug.",
    ),
    _concept(
        "feeling",
        "afraid",
        "afraid scared frightened nervous worried terrified",
        "{P} knees shook, so {feeling} was {s}.",
        "Being {feeling}, {name!} {move} behind a door.",
        "{S} was too {feeling} to open {p} eyes.",
    ),
    _concept(
        "feeling",
        "angry",
        "angry cross grumpy furious annoyed mad",
        "{S} stamped {p} foot, so {feeling} was {s}.",
        "Being {feeling}, {name!} {move} up and down.",
        "{P} face turned hot whenever {s} was {feeling}.",
    ),
    _concept(
        "feeling",
        "tired",
        "tired sleepy weary drowsy exhausted",
        "{name!} yawned, for {s} was {feeling}.",
        "{P} eyes closed, so {feeling} was {s}.",
        "Being {feeling}, {s} lay down on a pillow.",
    ),
    _concept(
        "feeling",
        "brave",
        "brave bold fearless daring courageous",
        "{S} stood tall, for {s} was {feeling}.",
        "Being {feeling}, {name!} {move} ahead.",
        "Nothing could stop a {feeling} child.",
    ),
    # animal: "a ..."
    _concept(
        "animal",
        "pets",
        "kitten puppy hamster rabbit cat dog",
        "The {animal!} rolled over to be petted.",
        "{name!} gave the {animal!} a cushion next to another {animal}.",
        "It wore a {colour} collar like any other {animal}.",
    ),
    _concept(
        "animal",
        "farm_animals",
        "cow pig goat sheep horse donkey",
        "The {animal!} chewed some straw.",
        "It had run away from a herd, like many a {animal}.",
        "{name!} led the {animal!} back to its stall beside a {animal}.",
    ),
    _concept(
        "animal",
        "forest_animals",
        "fox bear deer wolf badger squirrel",
        "The {animal!} had a den under an oak.",
        "It looked for acorns, as a {animal} does.",
        "Between the ferns there was one more {animal}.",
    ),
    _concept(
        "animal",
        "sea_animals",
        "crab whale dolphin seal fish turtle",
        "The {animal!} splashed and dived.",
        "It came from the deep sea, like every {animal}.",
        "In the waves {name!} could see one more {animal}.",
    ),
    _concept(
        "animal",
        "birds",
        "robin sparrow crow parrot pigeon swan",
        "The {animal!} spread its wings.",
        "It had a nest with eggs, like any {animal}.",
        "A {colour} feather fell as a {animal} flew past.",
    ),
    _concept(
        "animal",
        "insects",
        "bee beetle butterfly moth cricket dragonfly",
        "The {animal!} buzzed around {p} head.",
        "It crawled over a {size} leaf to a {animal}.",
        "On {p} sleeve sat one more {animal}.",
    ),
    _concept(
        "animal",
        "jungle_animals",
        "lion tiger monkey zebra giraffe leopard",
        "The {animal!} had come from a hot land far away.",
        "It had got out of the zoo with a {animal}.",
        "Between the palm leaves hid a {animal}.",
    ),
    # food: "some ..."
    _concept(
        "food",
        "fruit",
        "apples pears plums cherries grapes peaches",
        "{name!} picked {food} and {food} from the trees.",
        "The juice of the {food} dripped down {p} chin.",
        "There were stones and seeds in the {food}.",
    ),
    _concept(
        "food",
        "vegetables",
        "carrots peas beans potatoes turnips onions",
        "{name!} pulled {food} and {food} out of the ground.",
        "{S} washed the soil off the {food}.",
        "A {size} pot of {food} cooked over the fire.",
    ),
    _concept(
        "food",
        "sweets",
        "candies toffees chocolates lollipops caramels jellies",
        "{name!} unwrapped {food} and {food}.",
        "The {food} were in {colour} paper.",
        "{P} teeth stuck to the {food}.",
    ),
    _concept(
        "food",
        "baking",
        "buns muffins pies cakes pancakes biscuits",
        "{name!} took {food} and {food} out of the oven.",
        "There was flour all over the {food}.",
        "A smell of butter came from the {food}.",
    ),
    _concept(
        "food",
        "drinks",
        "milk cocoa tea lemonade cider coffee",
        "{S} filled one cup with {food} and one with {food}.",
        "{name!} drank the {food} from a {colour} cup.",
        "{S} spilled a drop of {food}.",
    ),
    # thing: "a ..."
    _concept(
        "thing",
        "toys",
        "ball doll kite puppet teddy marble",
        "{name!} played with the {thing!} for an hour.",
        "There was a {size} box with a {thing} for a game.",
        "It was time to play, first with a {thing}.",
    ),
    _concept(
        "thing",
        "vehicles",
        "boat train car truck bicycle wagon",
        "{name!} went for a ride with the {thing!}.",
        "The wheels squeaked like those of a {thing}.",
        "It went faster than any other {thing}.",
    ),
    _concept(
        "thing",
        "clothes",
        "hat scarf coat jacket sweater mitten",
        "{name!} put on the {thing!} and it fitted well.",
        "It was made of {colour} wool, like every good {thing}.",
        "A button had come off, as from an old {thing}.",
    ),
    _concept(
        "thing",
        "instruments",
        "drum flute violin trumpet guitar piano",
        "{name!} played a tune on the {thing!}.",
        "The music made everyone think of a {thing}.",
        "One day {s} would be in a band with a {thing}.",
    ),
    _concept(
        "thing",
        "tools",
        "hammer shovel ladder rope bucket rake",
        "{name!} used the {thing!} to mend a fence.",
        "Building a house takes more than a {thing}.",
        "In the {size} shed there had to be one more {thing}.",
    ),
    _concept(
        "thing",
        "treasure",
        "coin crown pearl ring necklace diamond",
        "The {thing!} was worth more than a house.",
        "A pirate must have lost it with a {thing}.",
        "There was a {size} chest, and in it one more {thing}.",
    ),
    _concept(
        "thing",
        "flowers",
        "daisy tulip rose poppy daffodil sunflower",
        "The {thing!} had soft petals.",
        "It smelled as sweet as a {thing}.",
        "{name!} put it in a {colour} vase with a {thing}.",
    ),
    _concept(
        "thing",
        "reading",
        "book map notebook postcard diary newspaper",
        "{name!} read every word of the {thing!}.",
        "A page was missing, as from an old {thing}.",
        "There was {colour} ink on it, like on a {thing}.",
    ),
    # family: "her ..."
    _concept(
        "family",
        "parents",
        "mother father mum dad mama papa",
        "{P} {family!} kissed {o} on the cheek.",
        '"Be home for supper," {p} {family} {speech}.',
        "{name!} held the hand of {p} {family}.",
    ),
    _concept(
        "family",
        "grandparents",
        "grandmother grandfather grandma grandpa granny",
        "{P} {family!} had silver hair and a rocking chair.",
        '"When I was young, we had no lamps," {p} {family} {speech}.',
        "{name!} sat on the lap of {p} {family}.",
    ),
    _concept(
        "family",
        "siblings",
        "brother sister cousin twin stepbrother stepsister",
        "{S} shared a room with {p} {family!}.",
        '"It is my turn now," {p} {family} {speech}.',
        "{name!} liked to tease {p} {family}.",
    ),
    # helper: "a ..."
    _concept(
        "helper",
        "workers",
        "baker farmer doctor teacher sailor painter",
        "The {helper!} {move} to work with {name!}.",
        "It is hard work to be a {helper}.",
        "A {helper} has to get up early and earn a living.",
    ),
    _concept(
        "helper",
        "magic_folk",
        "fairy wizard witch dragon mermaid goblin",
        "The {helper!} cast a spell on {name!}.",
        "It takes magic to be a {helper}.",
        '"You have three wishes," a {helper} {speech}.',
    ),
    _concept(
        "helper",
        "royals",
        "king queen prince princess knight duke",
        "The {helper!} lived in a {size} castle.",
        "It takes a throne to be a {helper}.",
        "{name!} had to bow before a {helper}.",
    ),
)

CONCEPTS: dict[str, Concept] = {concept.name: concept for concept in _ALL}
"""Every concept by name. The order is the column order of label arrays."""

GROUPS: dict[str, tuple[Concept, ...]] = {
    group: tuple(concept for concept in _ALL if concept.group == group)
    for group in dict.fromkeys(concept.group for concept in _ALL)
}
"""The concepts that can fill each role."""

CONCEPT_OF_WORD: dict[str, Concept] = {word: concept for concept in _ALL for word in concept.words}
"""The one concept that each word belongs to."""

LIKELIER: dict[str, tuple[str, dict[str, str]]] = {
    "animal": (
        "place",
        {
            "seaside": "sea_animals",
            "woods": "forest_animals",
            "farm": "farm_animals",
            "town": "jungle_animals",
            "mountains": "birds",
            "waters": "insects",
            "home": "pets",
        },
    ),
    "feeling": ("weather", {"rain": "sad", "sunshine": "happy", "storm": "afraid", "wind": "brave", "fog": "tired"}),
    "speech": ("feeling", {"angry": "loud_speech", "afraid": "quiet_speech", "happy": "merry_speech"}),
}
"""Group -> (earlier group, its concept -> the concept it makes likelier): the woods bring foxes, storms bring fear."""
