"""Files and folders on disk, and the console.

Begin with `writes`, which leaves files whole or as they were after a crash. `reading` reads JSON,
with one error for damage of any kind; `outputs` decides where commands may write, `locks` keeps
other processes out of a folder, `console` escapes what a console cannot show.
"""
