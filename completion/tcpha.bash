# SPDX-License-Identifier: GPL-2.0-or-later
# bash completion for tcphafe, tcphabe and tcphactl

_tcpha_daemon() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
	case $prev in
	-c) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	--run-dir) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
	--datapath) mapfile -t COMPREPLY < <(compgen -W "auto ebpf nfqueue" -- "$cur"); return ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "-c -f -t -V -h --print-toml --run-dir --datapath" -- "$cur")
}

_tcpha_servers() {
	"$1" ${2:+--run-dir "$2"} --json fe servers 2>/dev/null |
		grep -o '"server": "[^"]*"' | cut -d'"' -f4
}

_tcphactl() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
	local i word run_dir="" role="" command="" words
	for ((i = 1; i < COMP_CWORD; i++)); do
		word=${COMP_WORDS[i]}
		case $word in
		--run-dir) i=$((i + 1)); run_dir=${COMP_WORDS[i]} ;;
		-*) ;;
		*) if [[ -z $role ]]; then role=$word; elif [[ -z $command ]]; then command=$word; fi ;;
		esac
	done
	case $prev in
	--run-dir) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
	-c) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	esac
	case $role/$command in
	/) words="fe be lab doctor --run-dir --json -h -V" ;;
	fe/) words="status servers rules conns top stats test-request doctor set reload drain undrain unload" ;;
	be/) words="status conns doctor set unload" ;;
	lab/) words="up status down" ;;
	lab/up) words="--backends" ;;
	fe/set) [[ $prev == set ]] && words="dbglevel dtcinterval" ;;
	be/set) [[ $prev == set ]] && words="dbglevel" ;;
	fe/drain | fe/undrain) words=$(_tcpha_servers "${COMP_WORDS[0]}" "$run_dir") ;;
	fe/test-request) words="GET HEAD POST PUT DELETE -H --port" ;;
	fe/doctor | be/doctor | doctor/) words="-c" ;;
	*) words="" ;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
}

complete -F _tcpha_daemon tcphafe tcphabe
complete -F _tcphactl tcphactl
