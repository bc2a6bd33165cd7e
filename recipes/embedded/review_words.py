"""The words of the review generator: sentence forms, their vocabularies, and the phrases of each class."""

from __future__ import annotations


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(" | "))


def _lists(**texts: str) -> dict[str, tuple[str, ...]]:
    return {name: _split(text) for name, text in texts.items()}


SUBJECTIVE_FORMS: tuple[str, ...] = (
    "{film} never quite {verbs} , but {good}",
    "{film} is {deg} {adj} and {deg2} {adj}",
    "{a_film} that is {adj} without being {bad_adj}",
    "{part} is {deg} {adj} , even if {part} is {bad_adj}",
    "{good} , and {part} {deserves}",
    "{bad} , and no amount of {quality} can save it",
    "it 's {deg} {adj} , {deg2} {bad_adj} and , in the end , {adj}",
    "{film} has {quality} to spare , but {bad}",
    "if you like {kind_of} , you will find this one {deg} {adj}",
    "{opening} {film} is the {best} {genre} of the year",
    "{a_film} with {quality} and {quality} , and a {deg} {adj} {role}",
    "what could have been {adj} turns out to be {deg} {bad_adj}",
    "{part} keeps you {watching} , though {bad}",
    "i {felt} {deg} {moved} by {part} , and i am not ashamed to say so",
    "you may {not} care for {part} , but {good}",
    "a {bad_adj} , {bad_adj} mess of a {genre} that wastes {quality}",
    "a {adj} , {adj} {genre} with {quality} in every scene",
    "{part} and {part} make this {deg} {adj}",
    "too {bad_adj} to be {adj} , and too {bad_adj} to be any fun",
    "the result is {deg} {adj} , {like}",
    "there is {quality} here , and {film} {earns}",
    "{film} feels {like} : {bad_adj} , {bad_adj} and far too long",
    "at its best , {film} is {adj} ; at its worst , it is merely {bad_adj}",
    "it is hard to {resist} a {genre} this {adj}",
)
SUBJECTIVE_WORDS = _lists(
    film="the film | the movie | this picture | this {genre} | the director 's latest | the whole thing | it",
    a_film="a film | a movie | a {genre} | one of those films | a small {genre}",
    genre="comedy | drama | thriller | love story | horror film | documentary | sequel | musical | "
    "western | romance | action movie | family film | mystery",
    verbs="finds its footing | comes together | takes off | lives up to its promise | catches fire | "
    "adds up | earns its tears | makes sense",
    deg="very | surprisingly | deeply | quietly | utterly | truly | almost | often | painfully | "
    "wonderfully | rather",
    deg2="at times | more often | always | never less than | somehow | just as",
    adj="funny | moving | touching | charming | clever | beautiful | gripping | warm | honest | fresh | "
    "smart | tender | powerful | delightful | haunting | lively | thoughtful | sweet | original | "
    "exciting | graceful | witty",
    bad_adj="dull | silly | flat | boring | predictable | cold | sloppy | tired | shallow | clumsy | "
    "loud | empty | pretentious | slow | awkward | messy | lifeless | sentimental | stale | forced | "
    "confused | cheap",
    good="{part} is a {delight} | there is much to {admire} | it wins you over | "
    "the {ending} is {deg} {adj} | you will leave the theater {smiling} | it has a good heart | "
    "every scene {earns}",
    bad="the {ending} is {deg} {bad_adj} | the jokes fall flat | it runs out of {quality} | "
    "nothing feels real | the story is {bad_adj} | it takes far too long to get going | "
    "you have seen it all before | {part} is {deg} {bad_adj}",
    part="the script | the acting | the dialogue | the cast | the lead performance | the photography | "
    "the music | the humor | the pacing | the direction | the first half | the second half | "
    "the premise | the romance | the villain",
    deserves="deserves better | deserves every award | is worth the price of a ticket | stays with you | "
    "is a triumph | never lets go | shines",
    quality="charm | energy | wit | style | heart | imagination | good will | talent | ideas | passion | "
    "grace | suspense",
    kind_of="this kind of {genre} | loud jokes | slow stories | old-fashioned movies | big explosions | "
    "gentle humor",
    opening="for my money , | without a doubt , | like it or not , | believe it or not , | "
    "to my surprise , | sadly ,",
    best="best | worst | funniest | dullest | most {adj} | most {bad_adj} | bravest | saddest | strangest",
    role="lead | hero | heroine | cast | finish | performance at its center",
    watching="watching | guessing | laughing | caring | awake | on the edge of your seat",
    felt="was | felt | found myself",
    moved="moved | bored | charmed | cheated | amused | delighted | shaken",
    like="like a long joke without a punch line | like a warm bath | like homework | like a gift | "
    "like a good meal | like a bad dream | a treat for everyone | a waste of everyone 's time | "
    "a real surprise",
    earns="earns every laugh | works like a charm | looks great | feels right | knows what it wants to be",
    ending="ending | final act | last hour | finale | climax",
    delight="delight | joy | revelation | small miracle | pleasure",
    admire="admire | enjoy | love | savor",
    smiling="smiling | humming | moved | in tears | happy",
    resist="resist | dislike | forgive | recommend",
)
SUBJECTIVE_WORDS["not"] = ("not",)

OBJECTIVE_FORMS: tuple[str, ...] = (
    "{person} {moves} to {place} and {meets} {person2}",
    "when {person} {loses} , {he} must {task} before {deadline}",
    "{set_in} , {person} {falls} with {person2} , who {secret}",
    "after {event} , {person} returns to {place} to {task}",
    "{person} and {person2} {travel} to {place} , where they {discover}",
    "{name} , {person} , {finds} and decides to {task}",
    "the story follows {person} who {secret} and {travels} to {place}",
    "{name} is {person} whose life changes when {person2} {arrives}",
    "{set_in} , {person} is hired to {task} , but {twist}",
    "soon {name} learns that {person2} {secret}",
    "while {person} tries to {task} , {person2} {plans} to {task}",
    "{name} and {name2} grew up in {place} and {meets2} years later",
    "in order to {task} , {name} has to {task} and {task}",
    "one night {person} {finds} , and {he} is {chased} by {person2}",
    "{event} , {name} leaves {place} and {travels} to {place}",
    "{person} is {accused} , and only {person2} knows that {twist}",
    "the film tells the story of {person} , who {meets3} in {place}",
    "{name} has {deadline2} to {task} , or {stakes}",
    "{name} 's {relative} {secret} , and the family {travels} to {place}",
    "{he_start} works in {place} , but {his_dream} is to {task}",
)
OBJECTIVE_WORDS = _lists(
    person="a young {job} | an old {job} | a {trait} {job} | a retired {job} | a {job} from {town} | "
    "a {trait} girl | a {trait} boy | a group of {jobs} | a widow | a mother of three",
    person2="a mysterious {job} | a {job} | the daughter of a {job} | his {relative} | her {relative} | "
    "a stranger | a {trait} {job} | the local {job} | a gang of {jobs} | the son of a {job}",
    job="teacher | doctor | detective | soldier | painter | singer | farmer | lawyer | pilot | thief | "
    "cook | priest | boxer | nurse | writer | student | sailor | dancer | police officer | reporter | "
    "scientist | musician",
    jobs="soldiers | students | thieves | friends | brothers | sisters | sailors | detectives | dancers | "
    "robbers | teachers",
    trait="shy | lonely | poor | rich | stubborn | blind | homeless | young | famous | former | divorced",
    town="new york | london | paris | tokyo | texas | a small town | the north | chicago | berlin | "
    "mexico | india",
    place="a small town | the city | {town} | a village in the mountains | a remote island | "
    "his childhood home | an old hotel | a prison camp | the coast | a boarding school | the desert | "
    "her family 's farm | hollywood",
    moves="moves | returns | is sent | travels | comes | runs away",
    meets="meets | falls in love with | is forced to work with | moves in with | makes friends with | "
    "marries",
    meets2="meet again | fall in love | open a shop together | work for the same man | run for mayor",
    meets3="grew up | was born | disappeared | lived and died | spent ten years | opened a restaurant",
    loses="loses his job | is left by her husband | is kidnapped | wakes up in a strange house | "
    "inherits a house | finds a body | wins the lottery | is sent to prison | loses {relative2}",
    relative2="a sister | a son | his memory | her only child | a leg in the war",
    he="he | she",
    he_start="by day he | by night she | he | she | the man | the woman",
    his_dream="his dream | her dream | his plan | her secret wish | what he wants",
    task="save the {thing} | find the killer | win back {relative3} | solve the murder | rob a bank | "
    "raise the child | clear his name | escape from the island | learn the truth | pay the debt | "
    "stop the wedding | steal the {thing} | cross the border | bury her father | protect the town | "
    "start a new life | find a cure",
    thing="farm | school | painting | diamond | hotel | ship | orchestra | world | church | treasure | "
    "formula",
    relative="brother | sister | father | mother | uncle | best friend | cousin | grandmother | husband | "
    "wife | son",
    relative3="his wife | her husband | his daughter | the girl he loves | her family",
    deadline="the end of the week | midnight | the war ends | the police arrive | winter comes | "
    "the trial begins",
    deadline2="three days | one night | a week | twenty-four hours | one summer | a month",
    set_in="in 1944 | during the war | in a small village | in the near future | in the 1960s | "
    "on a cold winter night | in 19th century london | in the last days of summer | "
    "on the eve of the revolution",
    falls="falls in love | makes a deal | has an affair | shares a house | starts a business",
    secret="is hiding a secret | works for the mob | is not who he says he is | is dying | "
    "has been dead for years | has a plan of her own | witnessed a murder | is wanted by the police | "
    "wants to leave the country",
    event="after the death of his father | after ten years in prison | when the war breaks out | "
    "following the murder | after a car accident | when the factory closes | after her wedding day | "
    "when the school year ends",
    travel="travel | are sent | drive | escape | sail",
    travels="travels | is sent | drives | flies | escapes | moves",
    discover="discover a hidden {thing} | find a body | are taken prisoner | open a small cafe | "
    "meet {person2} | learn the truth about the {thing} | spend the summer",
    name="anna | jack | maria | david | lucy | sam | karen | tony | claire | victor | ray | nina | frank | "
    "elena | joe",
    name2="ben | rose | paul | sara | mike | julia | carl | laura | eddie | kate",
    finds="finds a bag of money | discovers a map | receives a letter | sees a murder | "
    "wakes up in a hospital | finds an old diary | gets a phone call | meets {person2}",
    arrives="arrives | moves in next door | comes back from the war | is murdered | disappears | "
    "offers him a job",
    twist="the money is gone | the real killer is still free | the house is not empty | "
    "she already knows him | someone is watching | the plan goes wrong | the body disappears",
    plans="plans | tries | is hired | is ordered | decides",
    chased="chased | followed | arrested | rescued | kidnapped | hidden",
    accused="accused of murder | sent to prison | found dead | offered a job | taken hostage | "
    "chosen to lead the team",
    stakes="the {thing} will be sold | his brother will die | she will lose the house | "
    "the town will be destroyed | the wedding is off",
)

PHRASES: dict[str, tuple[str, ...]] = {
    "objective": _split(
        "a plot summary | about the story | what happens | just facts | a description | the plot | "
        "a summary | only facts | about the characters | telling the story | a story outline | "
        "about events | a report | plain facts | factual | an account | about the plot | information | "
        "a simple summary | neutral | not an opinion | the storyline | a list of events | "
        "describing a scene | who does what | without opinion | background | a neutral summary | "
        "about a man | about a family | what the film shows | the facts | an outline | "
        "explaining the plot | a short summary | a narrative | the setting | the beginning | "
        "purely factual | about a journey"
    ),
    "subjective": _split(
        "an opinion | full of praise | a harsh verdict | a personal view | a complaint | praise | "
        "criticism | a judgment | how someone feels | enthusiastic | an attack | a strong opinion | "
        "very critical | full of feeling | a personal taste | warm praise | a rating | emotional | "
        "negative | positive | a recommendation | a verdict | somebody's view | mocking | disappointed | "
        "an evaluation | high praise | a critic's view | not neutral | a reaction | one person's taste | "
        "full of opinion | impressed | a warning | biased | unkind | angry | gushing | a clear judgment | "
        "what someone thinks"
    ),
    "neutral": _split(
        "quite short | about a film | one sentence | written in english | hard to read | well written | "
        "a review | interesting | about a movie | easy to read | what it says | a sentence | clear | "
        "not very long"
    ),
}
