#!/usr/bin/awk -f
# Turns a page of the documentation into the body of a manual page: its title goes,
# links become their text, and tables, which are wider than a terminal, become lists
# with the first cell as the term and the last one as its explanation.

NR == 1 && /^# / { next }
/^```/ { code = !code; print; next }
code { print; next }
/^\|/ {
	line = $0
	gsub(/\\\|/, "\001", line)
	sub(/^\| */, "", line)
	sub(/ *\|[ \t]*$/, "", line)
	n = split(line, cell, / *\| */)
	for (i = 1; i <= n; i++) gsub("\001", "|", cell[i])
	if (!table) {
		table = 1
		for (i = 1; i <= n; i++) head[i] = cell[i]
		next
	}
	if (line ~ /^[-:| ]+$/) next
	between = ""
	for (i = 2; i < n; i++) if (cell[i] != "")
		between = between (between == "" ? "" : ", ") (head[i] == "default" && cell[i] != "required" ? "default " : "") cell[i]
	printf "%s%s\n: %s\n\n", links(cell[1]), between == "" ? "" : " (" links(between) ")", links(cell[n])
	next
}
{ table = 0; print links($0) }

function links(s,    before, text) {
	while (match(s, /\[[^][]*\]\([^)]*\)/)) {
		text = substr(s, RSTART + 1, RLENGTH - 1)
		sub(/\]\([^)]*\)$/, "", text)
		s = substr(s, 1, RSTART - 1) text substr(s, RSTART + RLENGTH)
	}
	return s
}
