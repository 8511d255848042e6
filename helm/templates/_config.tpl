{{/* The router's settings: what the chart must set, with `config` merged over it. */}}

{{- define "twinring.modelPath" -}}
{{- if .Values.model.path -}}
{{- .Values.model.path -}}
{{- else if .Values.model.download.repo -}}
{{- printf "%s/%s" .Values.model.mountPath (base .Values.model.download.repo) -}}
{{- end -}}
{{- end -}}

{{- define "twinring.config" -}}
{{- if ne (int .Values.prefill.gpus) (int .Values.decode.gpus) -}}
{{- fail (printf "prefill.gpus is %v and decode.gpus is %v: workers of both roles take the same number" .Values.prefill.gpus .Values.decode.gpus) -}}
{{- end -}}
{{- $engine := dict "device" (ternary "cuda" "cpu" (gt (int .Values.prefill.gpus) 0)) -}}
{{- with include "twinring.modelPath" . -}}{{- $_ := set $engine "model" . -}}{{- end -}}
{{- $ray := dict
  "join_as_node" true
  "prefill_resource" "twinring_prefill"
  "decode_resource" "twinring_decode"
  "num_gpus_per_worker" (int .Values.prefill.gpus)
  "schedule_timeout_s" 900
  "start_timeout_s" 300
  "load_timeout_s" 1800
-}}
{{- $router := dict "listen" "0.0.0.0:50051" "http_listen" "0.0.0.0:8000" -}}
{{- if .Values.tls.existingSecret -}}
{{- $_ := set $router "tls_cert" "/etc/twinring-tls/tls.crt" -}}
{{- $_ := set $router "tls_key" "/etc/twinring-tls/tls.key" -}}
{{- end -}}
{{- $config := dict
  "num_prefill" (int .Values.prefill.replicas)
  "num_decode" (int .Values.decode.replicas)
  "worker_bind_host" "auto"
  "worker_port" 7001
  "tenants_file" "/etc/twinring-tenants/tenants.yaml"
  "drain_timeout_s" (int .Values.router.drainTimeoutSeconds)
  "worker_drain_timeout_s" (max (int .Values.prefill.drainTimeoutSeconds) (int .Values.decode.drainTimeoutSeconds))
  "engine" $engine
  "router" $router
  "ray" $ray
  "transfer" (dict "bind_host" "auto")
-}}
{{- toYaml (mustMergeOverwrite $config (deepCopy .Values.config)) -}}
{{- end -}}
