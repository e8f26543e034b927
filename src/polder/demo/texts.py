"""English prose, written for Polder's tests and demo, with questions that it answers."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PASSAGES", "Passage"]


class Passage(NamedTuple):
    text: str
    questions: tuple[tuple[str, str], ...]
    """With a short answer each."""


PASSAGES = (
    Passage(
        """The harbour of Ostrava Point freezes only in the hardest winters. In the year of the long frost the ice reached
the outer mole in a single night, and eleven boats were caught with their nets still down. The crews walked home
across the water. Old Marten Hale, who kept the light, counted them from the gallery with a spyglass and wrote each
name into his book. He was short by one. Nobody in the town could say who it was, for every family sat complete at its
table. In the spring, when the ice broke, a twelfth boat came in on the tide with her lamps burning and nobody
aboard.""",
        (
            (
                "How many boats were caught with their nets down?",
                "Eleven boats were caught with their nets still down.",
            ),
            ("Who kept the light of the harbour?", "Old Marten Hale kept the light."),
        ),
    ),
    Passage(
        """To bake a plain rye loaf you need four things: flour, water, salt and a starter that has been fed the day
before. Mix six hundred grams of dark rye flour with half a litre of warm water, add two spoons of starter and leave
the bowl under a cloth until morning. Then stir in the salt and another hundred grams of flour. The dough will be wet
and it will stick to everything. Fill it into a buttered tin with a wet spatula, smooth the top, and wait until small
holes appear on the surface. Bake it for an hour in a hot oven, and do not cut it before the next day.""",
        (
            ("How much dark rye flour is mixed first?", "Six hundred grams of dark rye flour are mixed first."),
            ("When may I cut the loaf?", "Do not cut the loaf before the next day."),
        ),
    ),
    Passage(
        """The committee met on the ninth of March to decide what should become of the old tram depot. The first proposal
was a market hall with room for sixty stalls. The second was a school of music, which the district has lacked since
the fire. The third, put forward by the residents of Lindon Street, was to leave the building alone and to plant trees
in the yard. The architect explained that the roof would not last two more winters without repair, whatever was
decided. A vote was taken. The market received four votes, the school six, and the trees seven, so no proposal had the
majority that the statutes ask for.""",
        (
            (
                "What is the first proposal for the tram depot?",
                "The first proposal is a market hall with room for sixty stalls.",
            ),
            ("How many votes did the trees receive?", "The trees received seven votes."),
        ),
    ),
    Passage(
        """A bicycle with hub gears needs little care, but it needs it regularly. Once a month, turn the bicycle over and
spin the rear wheel by hand. It should run on for at least half a minute, and silently. If it clicks, the cable is
probably too tight: loosen the adjusting screw by a quarter of a turn and try again. Wipe the chain with a dry rag,
put one drop of oil on each link, and wipe it again after an hour. Brake pads are worn out when the grooves in them
can no longer be seen. Never oil the rim. At the end of each season, take the wheel out and look for rust around the
axle.""",
        (
            ("Where should oil never go on a bicycle?", "Never oil the rim."),
            ("What should I look for around the axle?", "Look for rust around the axle."),
        ),
    ),
    Passage(
        """Dear Ilse, the expedition reached the northern hut on Tuesday, two days later than we had planned. The weather
was good as far as the second river, and there it turned. We lost one sledge and most of the paraffin, but all five of
us are well, and the instruments are dry. Jonas has a cough. I have begun to measure the wind every three hours, also
at night, because the pattern that Professor Adler described is real: it falls asleep before midnight and wakes at
four. Tell him that his barometer is the only thing up here that never complains. If the ship cannot come before the
end of August, send the second letter to the mission.""",
        (
            ("What did the expedition lose?", "The expedition lost one sledge and most of the paraffin."),
            ("Who has a cough?", "Jonas has a cough."),
        ),
    ),
    Passage(
        """The heart of the machine is a drum of brass as long as a forearm, with nine thousand holes in forty rows. A pin
in a hole lifts a lever, and the lever opens a pipe. The drum is turned by a weight that hangs in the tower, so that
it plays for six minutes before somebody has to climb up and wind it. In the seventeenth century the pins were set
anew each spring, and the town paid a carillonneur to choose the tunes. The last one, a woman named Adriana Coster,
set a melody that nobody could recognise. It took the students of the conservatory eighty years to see that it had to
be read backwards.""",
        (
            ("What is the heart of the machine?", "The heart of the machine is a drum of brass."),
            ("What was the name of the last carillonneur?", "The last carillonneur was Adriana Coster."),
        ),
    ),
    Passage(
        """Salt marshes grow where the sea brings more mud than it takes away. The first plant to settle is glasswort,
which stands the salt and slows the water down, so that more mud falls between its stems. After ten years the ground
has risen by the width of a hand, and grass takes over. Geese arrive in October and graze it short. Creeks cut through
the meadow in branches, like veins in a leaf, and the tide uses them twice a day. Whoever wants to protect a coast
does well to leave the marsh in front of the dike alone: a storm wave loses half of its height on every hundred metres
of grass.""",
        (
            ("Which plant settles first in a salt marsh?", "The first plant to settle is glasswort."),
            ("When do the geese arrive?", "The geese arrive in October."),
        ),
    ),
    Passage(
        """The witness said that she had closed the shop at seven, as on every evening, and had heard the first sound at a
quarter past. It was like a heavy book falling. She did not look up, because she was counting the money. The second
sound came from the yard, and this time the dog barked. Asked whether she had seen the defendant on that day, she said
that everybody had seen him: he had sat on the wall opposite since noon, with a newspaper, and had not turned a page.
The judge wanted to know how she could tell. She answered that the picture on the front was of a horse, and that it
had looked at her for seven hours.""",
        (
            ("At what time had the witness closed the shop?", "She had closed the shop at seven."),
            ("What was in the picture on the newspaper's front?", "The picture on the front was of a horse."),
        ),
    ),
)
