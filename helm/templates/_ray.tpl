{{/* What Ray is told at the start of a pod, and how one knows that the pod is well. */}}

{{/* Name -> value of `ray start`, as YAML. KubeRay gives it to a shell, which knows POD_IP by its own syntax. */}}
{{- define "twinring.rayStartParams" -}}
node-ip-address: {{ ternary "$POD_IP" "$(POD_IP)" .root.Values.kuberay.enabled }}
num-cpus: {{ ternary 0 .values.numCpus (eq .role "head") | quote }}
{{- if gt (int .values.gpus) 0 }}
num-gpus: {{ .values.gpus | quote }}
{{- end }}
object-store-memory: "83886080" # bytes; Ray's least, for no KV goes through it
{{- if eq .role "head" }}
include-dashboard: "false"
{{- else }}
resources: {{ dict (printf "twinring_%s" .role) 1 | toJson | quote }}
{{- end }}
{{- range .values.extraArgs }}
{{- $pair := splitn "=" 2 . }}
{{ trimPrefix "--" $pair._0 }}: {{ $pair._1 | quote }}
{{- end }}
{{- end -}}

{{- define "twinring.rayStartArgs" -}}
- start
{{- if eq .role "head" }}
- --head
- --port=6379
{{- else }}
- --address={{ include "twinring.headAddress" .root }}
{{- end }}
{{- range $name, $value := fromYaml (include "twinring.rayStartParams" .) }}
- {{ printf "--%s=%s" $name $value | quote }}
{{- end }}
- --block
{{- end -}}

{{/* All speak grpc.health.v1: Ray's head on its port, a worker on its own, with the services "live" and "ready". */}}
{{- define "twinring.rayProbes" -}}
{{- $probe := dict "grpc" (dict "port" 6379) }}
{{- $ready := $probe }}
{{- if ne .role "head" }}
{{- $probe = dict "grpc" (dict "port" 7001 "service" "live") }}
{{- $ready = dict "grpc" (dict "port" 7001 "service" "ready") }}
{{- end -}}
startupProbe:
  {{- toYaml (merge (dict) $probe .values.probes.startup) | nindent 2 }}
readinessProbe:
  {{- toYaml (merge (dict) $ready .values.probes.readiness) | nindent 2 }}
livenessProbe:
  {{- toYaml (merge (dict) $probe .values.probes.liveness) | nindent 2 }}
{{- end -}}

{{/* A pod of Ray. KubeRay puts `ray start` together by itself: then no command is named. */}}
{{- define "twinring.rayPodSpec" -}}
{{- include "twinring.podSettings" . }}
{{- with include "twinring.initContainers" . }}
initContainers:
  {{- . | nindent 2 }}
{{- end }}
containers:
  - name: {{ .role }}
    {{- include "twinring.containerSettings" . | nindent 4 }}
    {{- if not .root.Values.kuberay.enabled }}
    command: [ray]
    args:
      {{- include "twinring.rayStartArgs" . | nindent 6 }}
    {{- end }}
    env:
      {{- include "twinring.env" . | nindent 6 }}
    ports:
      {{- if eq .role "head" }}
      - name: gcs
        containerPort: 6379
      {{- else }}
      - name: worker
        containerPort: 7001
      {{- end }}
    {{- include "twinring.rayProbes" . | nindent 4 }}
    volumeMounts:
      {{- include "twinring.volumeMounts" . | nindent 6 }}
volumes:
  {{- include "twinring.volumes" . | nindent 2 }}
{{- end -}}
