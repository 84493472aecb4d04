#!/bin/sh
# Describes pictures, each in a window from which the words can be copied.
# "Describe image.workflow" has the same lines, which the Finder runs with the chosen pictures.
model=mlx-community/llava-1.5-7b-4bit # any that was used once, so that it is here
PATH="$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin:$PATH"

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
for picture in "$@"; do
    text=$(mlx-llava generate --quiet --offline --model "$model" --image "$picture" \
        --prompt "Describe this image in detail." 2>"$errors") || text=$(cat "$errors")
    osascript - "${picture##*/}" "$text" <<'END'
on run argv
    set {theName, theText} to argv
    display dialog theText with title theName buttons {"Copy", "OK"} default button "OK"
    if button returned of result is "Copy" then set the clipboard to theText
end run
END
done
