"""Word lists for the story generator: people, animals, things, places, feelings."""

from __future__ import annotations


def _words(text: str, mark: str = " ") -> tuple[str, ...]:
    return tuple(text.split(mark))


GIRLS = _words(
    "Lily Mia Anna Sara Emma Ruby Nora Lucy Ella Zoe Maya Rosa Ivy Clara Alice Hana Leila Tess Olive "
    "Jane Kate Eva Molly Amy Grace Daisy Nina Lola Ada June Priya Yuki Amara Carmen Freya"
)
BOYS = _words(
    "Tom Ben Sam Max Leo Jack Tim Noah Finn Oscar Henry Omar Jake Luke Adam Theo Eli Hugo Peter Sami "
    "Dan Will Toby Alex Ravi Kenji Diego Ali Mateo Joe George Felix Ned Milo Anton"
)
ANIMAL_NAMES = _words(
    "Pip Bramble Hazel Clover Nutmeg Pepper Tumble Moss Fern Acorn Bean Juniper Willow Rusty Fig"
)
HERO_ANIMALS = _words(
    "rabbit fox bear mouse squirrel hedgehog badger otter duckling kitten puppy owl frog beaver raccoon"
)
PET_NAMES = _words("Biscuit Rex Coco Luna Shadow Ginger Patch Buddy Waffles Socks Bella Rocky Muffin Oreo")

# full form after a possessive, short form, gender
RELATIVES: tuple[tuple[str, str, str], ...] = (
    ("{p} mother", "Mom", "f"),
    ("{p} father", "Dad", "m"),
    ("{p} grandmother", "Grandma", "f"),
    ("{p} grandfather", "Grandpa", "m"),
    ("{p} big sister", "{p} sister", "f"),
    ("{p} big brother", "{p} brother", "m"),
    ("{p} aunt", "{p} aunt", "f"),
    ("{p} uncle", "{p} uncle", "m"),
    ("{p} cousin", "{p} cousin", "m"),
    ("the neighbor", "the neighbor", "f"),
)

_LISTS: dict[str, str] = {
    "oneday": "one day|one morning|one afternoon|last week|last summer|on Saturday|on Sunday|yesterday|"
    "one Friday|this morning|one cold day|one sunny day|early one morning|after lunch one day",
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "season": "spring|summer|autumn|winter",
    "color": "red|blue|green|yellow|purple|orange|pink|white|brown|silver|golden|black",
    "small": "little|tiny|small",
    "big": "big|huge|large|tall",
    "nice": "nice|lovely|pretty|beautiful|wonderful|special",
    "old": "old|rusty|dusty|worn|faded",
    "happy": "happy|glad|proud|cheerful|delighted",
    "sad": "sad|upset|unhappy|disappointed|gloomy",
    "afraid": "afraid|scared|nervous|frightened",
    "toy": "teddy bear|toy train|doll|toy car|stuffed rabbit|toy boat|wooden horse|toy robot|puppet|"
    "toy truck|stuffed elephant|toy dinosaur|rag doll|toy plane|spinning top",
    "treasure": "key|ring|coin|necklace|watch|whistle|medal|locket|marble|brooch|compass|bracelet",
    "clothes": "hat|scarf|coat|sweater|jacket|mitten|shoe|sock|glove|raincoat",
    "fruit": "apples|pears|plums|cherries|strawberries|blueberries|peaches|raspberries|grapes",
    "onefruit": "apple|pear|plum|peach|banana|orange|mango",
    "vegetable": "carrots|tomatoes|pumpkins|beans|peas|potatoes|onions|radishes|cabbages",
    "flower": "roses|tulips|daisies|sunflowers|lilies|violets|poppies|daffodils",
    "cake": "cake|apple pie|chocolate cake|honey cake|cherry pie|carrot cake|lemon cake|walnut cake",
    "sweet": "cookie|muffin|pancake|cupcake|doughnut|candy bar|bun|lollipop",
    "soup": "soup|stew|porridge|pasta|rice|noodles|chili",
    "drink": "milk|water|juice|tea|lemonade|hot chocolate|cocoa",
    "pet": "dog|cat|puppy|kitten|rabbit|hamster|parrot|turtle",
    "farm": "cow|horse|sheep|goat|pig|donkey|pony|hen|goose|lamb",
    "wild": "fox|deer|squirrel|rabbit|hedgehog|owl|raccoon|bear cub|badger|mole",
    "bird": "robin|sparrow|crow|duck|swan|blackbird|pigeon|gull|finch|wren",
    "bug": "ladybug|butterfly|beetle|bee|snail|caterpillar|spider|cricket|firefly|ant",
    "seaside": "shell|starfish|crab|bottle|smooth stone|feather|piece of driftwood|rope",
    "room": "kitchen|bedroom|attic|garage|basement|living room|hallway|bathroom",
    "place": "park|beach|forest|zoo|farm|lake|river|museum|library|market|mountain|playground",
    "outside": "park|garden|forest|field|meadow|yard|woods|orchard|playground",
    "hide": "under the bed|behind the sofa|in the closet|under the kitchen table|behind the curtain|"
    "in the laundry basket|on top of the shelf|in the garden shed|under a pile of leaves|inside an old boot|"
    "behind the big tree|in the back seat of the car|under the stairs|in the toy box|beside the bathtub",
    "instrument": "piano|violin|drum|flute|guitar|trumpet|harp|cello",
    "sport": "soccer|baseball|basketball|tennis|hockey|volleyball",
    "game": "cards|tag|chess|hide and seek|marbles|checkers|hopscotch|jump rope",
    "subject": "math|reading|spelling|music|art|science|history",
    "topic": "dragons|pirates|space|dinosaurs|trains|whales|knights|ghosts|robots|castles|horses",
    "costume": "pirate|princess|dragon|robot|wizard|lion|ghost|astronaut|clown|bee",
    "vehicle": "bus|train|car|boat|bicycle|tractor|truck",
    "tool": "hammer|saw|rope|shovel|ladder|bucket|broom|flashlight",
    "gift": "book|puzzle|kite|scarf|paint set|music box|drum|camera|telescope|jigsaw|teapot|basketball",
    "craft": "glue|tape|string|paper|cardboard|clay|wood|cloth|paint|yarn",
    "weather": "rain|snow|wind|fog|hail",
    "shop": "bakery|toy store|bookshop|candy store|grocery store|shoe store|pet shop|flower shop",
    "number": "two|three|four|five|six|seven|ten|twelve|twenty",
    "part": "arm|leg|knee|foot|hand|ankle|finger|elbow",
    "dish": "plate|vase|bowl|cup|lamp|mirror|jar|teapot|picture frame",
    "berry": "blueberries|raspberries|blackberries|strawberries|cherries",
    "treasures": "books|paintings|old toys|clocks|maps|musical instruments|dresses|puppets",
    "smalltoy": "yo-yo|toy car|baseball card|comic book|spinning top|sticker book|whistle",
    "quick": "quickly|slowly|carefully|quietly|bravely|gently|proudly",
}
WORDS: dict[str, tuple[str, ...]] = {name: _words(text, "|") for name, text in _LISTS.items()}

OPENERS: tuple[str, ...] = (
    "It was a [sunny|cold|rainy|quiet|windy|bright|foggy] [morning|day|afternoon] in "
    "[the village|town|{season}].",
    "The [sun was shining|wind was blowing|snow was falling|birds were singing] over "
    "the [town|hills|fields].",
    "It was {day}, and there was no school.",
    "{season} had come [at last|early that year].",
    "Nobody in the family would forget that {day}.",
    "The [house|street|whole town] was [very quiet|full of noise|just waking up].",
)
CODAS: tuple[str, ...] = (
    "{N} told [the whole family|everyone at school|{F}] about it.",
    "That night {N} slept very well.",
    "After that, {N} and {F} went home for [supper|dinner|a warm drink].",
    "{N} [never forgot|always remembered] that day.",
    "{N} wrote about it in {his} [diary|notebook].",
    "It was [late|dark] when {he} finally went to bed.",
    "The next day {he} [smiled when {he} thought about it|was ready for something new].",
)
