#compdef corepipectl core-pipe-receiver core-pipe-forwarder
# zsh completion. The program knows what may come next (receiver/completion.py). Its words can be a crashed program's
# choice: they are passed on as they are, and compadd quotes what it inserts.
local line tab=$'\t'
local -a answer candidates shown
answer=("${(@f)$("${words[1]:t}" __complete zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null </dev/null)}")
case ${answer[1]-} in
    files)
        [[ $PREFIX == --*=* ]] && compset -P '*='
        _files
        ;;
    dirs)
        [[ $PREFIX == --*=* ]] && compset -P '*='
        _files -/
        ;;
    words)
        for line in "${(@)answer[2,-1]}"; do
            candidates+=("${line%%$tab*}")
            shown+=("${line%%$tab*}${${line#*$tab}:+  -- ${line#*$tab}}")
        done
        (( $#candidates )) && compadd -l -d shown -a candidates
        ;;
esac
