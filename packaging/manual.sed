#!/bin/sed -f
# Turns a page of the documentation into the body of a manual page: its title goes,
# links become their text.
1{/^# /d}
s/\[\([^]]*\)\]([^)]*)/\1/g
