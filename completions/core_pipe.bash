# bash completion of corepipectl, core-pipe-receiver and core-pipe-forwarder.
#
# The program knows what may come next (receiver/completion.py). Its words can be a crashed program's choice, so they go
# into COMPREPLY as they are: no eval and no `compgen -W`, which would run what is in them.
_core_pipe() {
    local -a answer
    # By its name alone: a Tab runs nothing out of the directory that one happens to be in.
    mapfile -t answer < <("${1##*/}" __complete bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null </dev/null)
    COMPREPLY=("${answer[@]:1}")
    case ${answer[0]-} in
        files) compopt -o default ;;
        dirs) compopt -o dirnames ;;
    esac
}
complete -F _core_pipe corepipectl core-pipe-receiver core-pipe-forwarder
