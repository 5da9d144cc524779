"""The English words that the rules know: closed classes, verbs that prompts use, and words for how an image is made.

Words that are in no list are nouns or what goes before one, unless their form and their neighbors say otherwise.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- closed classes ---------------------------------------------------------------------------------------------------

SINGULAR_DETERMINERS = _words("a an one this each every another")
PLURAL_DETERMINERS = _words(
    "two three four five six seven eight nine ten eleven twelve twenty these those some many several few both all "
    "most dozen hundred thousand million countless various numerous multiple"
)
DETERMINERS = (
    SINGULAR_DETERMINERS | PLURAL_DETERMINERS | _words("the any no its his her their my your our other half own")
)
NEGATIONS = _words("no without")
AUXILIARIES = _words("is are was were be been being has have had do does did could would shall should might must")
AMBIGUOUS_AUXILIARIES = _words("can will may")
MODALS = AMBIGUOUS_AUXILIARIES | _words("could would should might must do does did")
PREPOSITIONS = _words(
    "of in on at to from by for with without as than into onto over under above below beneath underneath beside "
    "besides behind between among amongst amid amidst near along alongside across around through throughout inside "
    "outside within upon off against about before after during toward towards past opposite via like unlike except "
    "including instead"
)
CONJUNCTIONS = _words("and or but nor while when where which who whom whose that because if then so until since both")
PRONOUNS = _words(
    "it he she they we you i them him me us there here itself himself herself themselves someone somebody something "
    "everyone everything anyone anything nothing nobody nowhere everywhere somewhere mine yours theirs what"
)
ADVERBS = _words(
    "very not also only just too even almost quite rather really again always never often out up down away together "
    "apart forward upward upwards downward downwards backwards sideways overhead nearby indoors outdoors upside next "
    "such more less"
)
# Adjectives that stand behind their noun.
PREDICATIVE = _words("asleep awake alone alive alike ablaze aglow afloat aloft ajar adrift afar aside ahead")
BREAKS = PREPOSITIONS | CONJUNCTIONS | PRONOUNS | AUXILIARIES | ADVERBS | PREDICATIVE
# Amounts, which are not things: "a pair of shoes".
AMOUNTS = _words(
    "pair pairs group groups couple bunch lot lots number variety kind kinds type types sort sorts set series dozens "
    "hundreds thousands millions plenty"
)
# Where something is in the image.
LOCATIONS = _words(
    "left right top bottom front side sides middle center centre rear back background foreground distance corner"
)
SIDES = _words("left right top bottom front side middle center centre")
TIMES = _words(
    "day daytime night nighttime noon dusk dawn morning afternoon evening midnight winter summer autumn fall time hour"
)

# --- verbs, in their base form ----------------------------------------------------------------------------------------

# With an object: "holding flowers" is no kind of flowers.
TRANSITIVE = _words(
    "wear hold carry eat drink ride play read use make cook bake watch catch chase hug kiss feed wash clean push pull "
    "drag lift throw kick hit paint draw write build repair fix mend cut chop slice pour serve sell buy give take "
    "bring show say display depict feature contain hide cross enter cast wield lead drive cover surround face touch "
    "pet walk mix stir open close drop pick reach guard fight attack follow climb"
)
INTRANSITIVE = _words(
    "sit stand lie lean look stare gaze gallop sleep run jump leap fly swim float sail hang rest perch crouch kneel "
    "dance sing smile laugh cry shine glow burn rise fall grow flow hover emerge wander wait work live come go talk "
    "speak think dream pose point turn move stretch travel roam soar descend crawl roll wave relax graze bloom melt "
    "crash"
)
VERBS = TRANSITIVE | INTRANSITIVE
# Their -s forms are also things that images show: "ocean waves". Verbs only where the grammar of the phrase says so.
ALSO_NOUNS = _words(
    "play watch drink cook cut slice show display cover face pet guard stand fly sail dance wave roll point dream "
    "look mix drop pick cast drive build paint cross glow smile"
)
# Past forms that do not end in -ed: participles, which also stand before a noun, and past tenses, which do not.
PARTICIPLES = _words(
    "made lit worn held seen shown drawn written woven built hung born known taken given torn broken frozen hidden "
    "grown overgrown sunk spread ridden flown eaten kept lost found thrown sewn bent wound strewn spun stuck clad "
    "caught bound laid swept"
)
PAST_TENSES = _words("sat stood rode ran flew ate drank wore held kept threw took wrote drew swam sang fell lay")
NAMING = _words("named called titled entitled labeled labelled reading saying")
# What ends in -ed or -ly and is neither a participle nor an adverb.
NOUNS_IN_ED = _words("seed weed reed steed feed breed creed deed need speed hundred thoroughbred moped biped shed sled")
NOT_ADVERBS = _words(
    "butterfly dragonfly firefly fly lily jelly belly family bully rally holly ally assembly monopoly anomaly italy "
    "curly silly ugly lovely friendly woolly wooly early elderly lonely ghostly heavenly lively daily deadly prickly "
    "bubbly wrinkly smelly hilly chilly steely pearly burly gnarly scaly oily doily potbelly"
)
NOUNS_IN_S = _words(
    "lens canvas gas atlas christmas texas kansas paris series species mars venus glass bus dress chess iris tennis "
    "headquarters cosmos pegasus jeans pants shorts scissors sunglasses glasses always"
)
PLURALS = _words("people men women children mice geese sheep fish deer feet teeth police cattle")
NOUNS_IN_ING = _words(
    "building ring king wing string spring ceiling clothing thing morning evening painting sling lightning awning "
    "earring railing stocking swing viking wedding pudding duckling gosling starling dumpling sapling seedling "
    "herring drawing rendering engraving crossing icing frosting lighting bedding flooring fling being offspring "
    "shilling sterling inning darling sibling"
)
# What a thing is for, when a noun follows.
USES_IN_ING = _words(
    "dining parking living baking frying cutting chopping washing sewing knitting writing reading swimming "
    "fishing sailing rowing hiking running boxing bowling skating skiing camping shopping sleeping walking wrapping "
    "printing measuring vending flying sitting watering riding drinking"
)

# --- adjectives -------------------------------------------------------------------------------------------------------

COLORS = _words(
    "red orange yellow green blue purple violet pink brown black white gray grey gold golden silver turquoise teal "
    "cyan magenta beige crimson scarlet"
)
MATERIALS = _words(
    "wooden wood steel metal metallic glass plastic paper stone brick leather ceramic bronze iron copper marble "
    "porcelain silk wool cotton cardboard concrete"
)
OTHER_ADJECTIVES = _words(
    "big large small little tiny huge giant gigantic enormous massive tall short long wide narrow thick thin fat slim "
    "round square flat deep shallow high low old young new ancient modern antique vintage retro medieval futuristic "
    "cute adorable pretty beautiful handsome ugly elegant cozy fluffy furry hairy curly shiny glossy rusty dusty "
    "dirty clean wet dry hot cold warm cool icy snowy rainy sunny cloudy foggy misty stormy dark bright light pale "
    "vivid colorful colourful happy sad angry sleepy scary spooky creepy fierce brave calm quiet peaceful serene "
    "lonely busy empty full open soft hard sharp smooth rough heavy fresh ripe raw sweet magic magical mystical "
    "majestic mysterious epic dramatic surreal abstract realistic photorealistic hyperrealistic cinematic intricate "
    "ornate delicate complex simple minimal minimalist minimalistic symmetrical geometric isometric transparent "
    "translucent royal wild lush kawaii fantastic fantasy gothic gloomy moody ethereal dreamy vibrant stunning "
    "gorgeous amazing incredible perfect detailed hd uhd dynamic whimsical dystopian"
)
ADJECTIVES = COLORS | MATERIALS | OTHER_ADJECTIVES
ADJECTIVE_ENDINGS = ("ful", "ous", "less", "esque", "ed")
# Both: things when they stand alone.
ALSO_THINGS = MATERIALS | _words("orange violet gold silver giant square light glass magic fantasy full")

# --- what an image is, not what it shows; and praise ------------------------------------------------------------------

# Things too, where the image shows one: "a girl holding a photo".
MEDIA = _words(
    "photo photograph picture image painting illustration drawing render rendering sketch portrait artwork art "
    "watercolor watercolour wallpaper print engraving screenshot snapshot still photoshoot"
)
# Nouns that end a phrase about the image: "soft lighting", "aerial view".
CRAFT = _words(
    "lighting quality resolution style styles detail details view shot close-up closeup angle perspective aesthetic "
    "aesthetics composition focus photography atmosphere mood ambience vibe vibes blur bokeh depth masterpiece render "
    "rendering artstation interior exterior color colour colors colours tones palette exposure engine word words text "
    "letters phrase message slogan caption title writing contrast camera viewer motion effect effects design"
)
PRAISE = _words(
    "highly ultra best trending 4k 8k 16k hd uhd hdr 3d 2d sharp award winning professional photorealistic "
    "hyperrealistic realistic cinematic detailed intricate artstation octane unreal macro wide close extreme "
    "extremely"
)
# How a medium is made; things where a determiner comes before them: "in a studio".
TECHNIQUES = _words(
    "oil ink pencil charcoal pastel gouache acrylic crayon watercolor watercolour digital studio product stock pixel "
    "vector concept matte line"
)
# Whole phrases of that kind.
PHRASES = tuple(
    tuple(phrase.split())
    for phrase in (
        "depth of field",
        "golden hour",
        "point of view",
        "rule of thirds",
        "oil on canvas",
        "acrylic on canvas",
        "black and white photo",
        "black and white photograph",
        "black and white photography",
    )
)
# Whoever follows "by" after these has made the image.
MAKING = _words("painted drawn illustrated photographed designed directed inspired rendered created art made")
