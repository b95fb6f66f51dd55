# fish completion of corepipectl, core-pipe-receiver and core-pipe-forwarder.
#
# The program knows what may come next (receiver/completion.py). Its words can be a crashed program's choice: fish takes
# the lines of a command substitution as they are, and escapes what it inserts.
function __core_pipe_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program (string replace -r '.*/' '' -- $words[1])
    # fish says on its own that there is no such program, whatever is redirected.
    command -q $program; or return
    set -l answer (command $program __complete fish $words[2..-1] "$current" 2>/dev/null </dev/null)
    set -l option (string match -r '^--[^=]*=' -- $current)
    set -l path (string replace -r '^--[^=]*=' '' -- $current)
    switch "$answer[1]"
        case files
            for found in (__fish_complete_path $path)
                printf '%s%s\n' "$option" $found
            end
        case dirs
            for found in (__fish_complete_directories $path)
                printf '%s%s\n' "$option" $found
            end
        case words
            printf '%s\n' $answer[2..-1]
    end
end
for program in corepipectl core-pipe-receiver core-pipe-forwarder
    complete -c $program -f -a '(__core_pipe_complete)'
end
