"""The words of the demo's requests: things people ask for, and the ways in which they ask.

All of it is the product's own writing. `ITEMS` maps each category to its canonical things and what
people call them; the contract wants the canonical name, whatever the request says.
"""

from __future__ import annotations

# canonical name -> (singular, plural) of every way to say it
ITEMS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "maintenance": {
        "radiator": (("radiator", "radiators"), ("heater", "heaters"), ("heating unit", "heating units")),
        "lamp": (("lamp", "lamps"), ("ceiling light", "ceiling lights"), ("light fitting", "light fittings")),
        "window": (("window", "windows"), ("window pane", "window panes")),
        "door lock": (("door lock", "door locks"), ("lock on the door", "locks on the doors")),
        "sink": (("sink", "sinks"), ("wash basin", "wash basins")),
        "air conditioner": (("air conditioner", "air conditioners"), ("AC unit", "AC units"), ("aircon", "aircons")),
    },
    "it": {
        "laptop": (
            ("laptop", "laptops"),
            ("notebook computer", "notebook computers"),
            ("portable computer", "portable computers"),
        ),
        "monitor": (("monitor", "monitors"), ("screen", "screens"), ("computer display", "computer displays")),
        "keyboard": (("keyboard", "keyboards"),),
        "printer": (("printer", "printers"), ("laser printer", "laser printers")),
        "headset": (("headset", "headsets"), ("pair of headphones", "headphones")),
        "docking station": (("docking station", "docking stations"), ("dock for my laptop", "laptop docks")),
    },
    "travel": {
        "train ticket": (
            ("train ticket", "train tickets"),
            ("rail ticket", "rail tickets"),
            ("seat on the train", "seats on the train"),
        ),
        "flight": (("flight", "flights"), ("plane ticket", "plane tickets"), ("air ticket", "air tickets")),
        "hotel room": (("hotel room", "hotel rooms"), ("room at a hotel", "rooms at a hotel")),
        "rental car": (("rental car", "rental cars"), ("hire car", "hire cars")),
        "taxi": (("taxi", "taxis"), ("cab", "cabs")),
    },
    "purchase": {
        "desk": (("desk", "desks"), ("standing desk", "standing desks"), ("work table", "work tables")),
        "office chair": (
            ("office chair", "office chairs"),
            ("swivel chair", "swivel chairs"),
            ("desk chair", "desk chairs"),
        ),
        "whiteboard": (("whiteboard", "whiteboards"), ("dry-erase board", "dry-erase boards")),
        "coffee machine": (("coffee machine", "coffee machines"), ("coffee maker", "coffee makers")),
        "filing cabinet": (("filing cabinet", "filing cabinets"), ("file cabinet", "file cabinets")),
        "projector": (("projector", "projectors"), ("beamer", "beamers")),
    },
    "access": {
        "key card": (("key card", "key cards"), ("access card", "access cards"), ("door badge", "door badges")),
        "parking permit": (("parking permit", "parking permits"), ("parking pass", "parking passes")),
        "locker": (("locker", "lockers"), ("storage locker", "storage lockers")),
        "visitor pass": (("visitor pass", "visitor passes"), ("guest badge", "guest badges")),
    },
    "cleaning": {
        "carpet": (("carpet", "carpets"), ("rug", "rugs")),
        "kitchen": (("kitchen", "kitchens"), ("kitchenette", "kitchenettes"), ("pantry", "pantries")),
        "restroom": (("restroom", "restrooms"), ("toilet", "toilets"), ("bathroom", "bathrooms")),
        "waste bin": (("waste bin", "waste bins"), ("trash can", "trash cans"), ("rubbish bin", "rubbish bins")),
    },
}

# What is said of one thing ({one}: "the lamp", {a}: "a lamp") or of several ({some}: "three lamps").
CORES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "maintenance": (
        (
            "{one} {at} is broken",
            "{one} {at} has stopped working",
            "something is wrong with {one} {at}",
            "please have {one} {at} repaired",
            "could someone look at {one} {at}",
            "{one} {at} makes a strange noise",
            "can you fix {one} {at}",
            "{one} {at} needs a repair",
            "we have trouble with {one} {at}",
            "I would like to report {one} {at} as damaged",
            "{one} {at} is leaking or loose, I cannot tell",
            "nobody has repaired {one} {at} yet",
        ),
        (
            "{some} {at} are broken",
            "{some} {at} have stopped working",
            "please have {some} {at} repaired",
            "could someone look at {some} {at}",
            "we counted {some} {at} that need a repair",
            "can you fix {some} {at}",
        ),
    ),
    "it": (
        (
            "I need {a} {at}",
            "please send {a} to me {at}",
            "can I get {a} {at}",
            "{one} {at} does not turn on any more",
            "a new colleague {at} needs {a}",
            "could you set up {a} {at}",
            "{one} {at} shows an error all the time",
            "my team {at} asks for {a}",
            "please replace {one} {at}",
            "we are missing {a} {at}",
            "I was told to order {a} from you {at}",
            "is it possible to borrow {a} {at}",
        ),
        (
            "I need {some} {at}",
            "please send {some} to us {at}",
            "can we get {some} {at}",
            "the new colleagues {at} need {some}",
            "could you set up {some} {at}",
            "we are missing {some} {at}",
            "my team {at} asks for {some}",
        ),
    ),
    "travel": (
        (
            "please book {a} for me",
            "I need {a} for the fair in spring",
            "can you reserve {a} for my visit to the client",
            "could you arrange {a} for our guest",
            "I have to see a supplier and need {a}",
            "please organise {a} for the site visit",
            "book {a} for the audit",
            "we want {a} for the speaker",
            "my trip was approved, so I need {a}",
            "kindly get me {a}",
        ),
        (
            "please book {some} for us",
            "we need {some} for the fair in spring",
            "can you reserve {some} for the delegation",
            "could you arrange {some} for our guests",
            "please organise {some} for the site visit",
            "book {some} for the audit team",
        ),
    ),
    "purchase": (
        (
            "please order {a} {at}",
            "we would like to buy {a} {at}",
            "can you purchase {a} {at}",
            "I want to request {a} {at}",
            "our budget covers {a} {at}",
            "it is time for {a} {at}",
            "{a} should be bought {at}",
            "the team asked me to order {a} {at}",
            "could we have {a} {at}",
            "put {a} on the shopping list {at}",
        ),
        (
            "please order {some} {at}",
            "we would like to buy {some} {at}",
            "can you purchase {some} {at}",
            "I want to request {some} {at}",
            "our budget covers {some} {at}",
            "could we have {some} {at}",
        ),
    ),
    "access": (
        (
            "I need {a} {at}",
            "please issue {a} {at}",
            "my colleague has a problem with {one} {at}",
            "can you prepare {a} {at}",
            "how do I get {a} {at}",
            "could you activate {a} {at}",
            "I start on Monday and have no {bare} {at}",
            "please replace {one} {at}",
            "our intern should receive {a} {at}",
        ),
        (
            "we need {some} {at}",
            "please issue {some} {at}",
            "can you prepare {some} {at}",
            "could you activate {some} {at}",
            "our interns should receive {some} {at}",
            "my colleagues have trouble with {some} {at}",
        ),
    ),
    "cleaning": (
        (
            "{one} {at} is dirty",
            "please clean {one} {at}",
            "could someone clean {one} {at}",
            "{one} {at} smells bad",
            "{one} {at} was not cleaned yesterday",
            "there is a spill, {one} {at} needs cleaning",
            "{one} {at} looks terrible",
            "can the cleaners come for {one} {at}",
        ),
        (
            "{some} {at} are dirty",
            "please clean {some} {at}",
            "could someone clean {some} {at}",
            "{some} {at} were not cleaned yesterday",
            "can the cleaners come for {some} {at}",
        ),
    ),
}

# {b}: building letter, {n}: three digits
PLACES = (
    "in {b}-{n}",
    "in room {b}-{n}",
    "in {b}{n}",
    "at {b} {n}",
    "in building {b}, room {n}",
    "in room {n} of building {b}",
    "(room {b}{n})",
    "for {b}-{n}",
    "over in {b}-{n}",
    "in office {b}-{n}",
    "in {n}, building {b}",
)

URGENCY: dict[str, tuple[str, ...]] = {
    "low": (
        "no rush",
        "not urgent",
        "this is not urgent at all",
        "whenever you have time",
        "it can wait",
        "no hurry",
        "take your time",
        "some day this month is fine",
        "low priority",
        "it does not need to be soon",
    ),
    "normal": (
        "",
        "",
        "",
        "thanks in advance",
        "let me know",
        "many thanks",
        "that would be great",
        "thank you for your help",
    ),
    "high": (
        "this is urgent",
        "as soon as possible please",
        "we need it today",
        "ASAP",
        "it cannot wait",
        "please hurry",
        "this is an emergency",
        "right away if you can",
        "high priority",
        "people cannot work until then",
        "we are blocked by this",
    ),
}

OPENINGS = (
    "",
    "",
    "",
    "Hello,",
    "Hi,",
    "Hi team,",
    "Good morning,",
    "Dear colleagues,",
    "Hey there,",
    "Good afternoon,",
    "Hello facilities,",
    "Sorry to bother you,",
    "Quick one:",
    "Me again:",
    "As discussed on the phone,",
    "Hope you are well.",
    "Small request:",
)

CLOSINGS = (
    "",
    "",
    "",
    "",
    "Best, {who}",
    "Regards, {who}",
    "Cheers, {who}",
    "{who}",
    "Kind regards, {who} (ext. {ext})",
    "Sent from my phone",
    "Yours, {who}",
)

NAMES = (
    "Ada",
    "Bruno",
    "Chiara",
    "Deniz",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jana",
    "Kofi",
    "Lena",
    "Mateo",
    "Nora",
    "Oskar",
    "Priya",
    "Rosa",
    "Samir",
    "Tess",
    "Uma",
    "Viktor",
    "Wanda",
    "Yuki",
    "Zoe",
)

# Sentences that mention something else and change nothing; {other} is another thing, {place} another room.
DISTRACTIONS = (
    "The {other} is fine, by the way.",
    "I do not need the {other} any more.",
    "My own desk is in {place}.",
    "I am writing from {place}.",
    "Forget what I said about the {other}.",
    "We are {count} people in the team.",
    "Not the {other}, that one works.",
    "Ticket {ext} about the {other} can be closed.",
)

NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 8: "eight", 10: "ten", 12: "twelve"}
